"""DeepSpeed ZeRO-3 behind the engine interface: weights, gradients and moments split over the data-parallel ranks.

bfloat16 weights and gradients with float32 master weights, all micro-batches of a step reduced at once
(`coalesce_grad_reduction`, which needs gradient_accumulation_steps = 1). Small tensors stay gathered between steps
(persistence thresholds); they are gathered together once after the optimizer step.
Reads a few private fields of DeepSpeed's stage-3 optimizer, checked at construction against the versions tested.
"""

import contextlib
import importlib
import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unicom_dist.config.errors import PreflightError
from unicom_dist.parallel.engine import (
    Buffers,
    Fragment,
    OptimizerConfig,
    check_finite,
    decay_groups,
    fragments_of,
    pieces_of,
)
from unicom_dist.parallel.mesh import Mesh

PERSIST_ELEMENTS = 1 << 20  # parameters up to this size stay gathered ...
PERSIST_TOTAL = 32 << 20  # ... as long as they are not more than this altogether (64 MiB in bfloat16)
_NEEDED = ("fp32_partitioned_groups_flat", "fp16_groups", "grad_position", "persistent_parameters", "overflow")


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, imported late (seconds) and quietly: its messages go to the logger "DeepSpeed" at WARNING."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            import deepspeed
        except ImportError as error:
            raise PreflightError(
                "parallel.zero_stage = 3",
                f"DeepSpeed cannot be imported: {error}",
                "pip install 'deepspeed>=0.19.8,<0.20'",
            ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    backend = importlib.import_module("deepspeed.comm.torch")
    if not hasattr(backend, "build_shm_op"):
        raise _other_version(deepspeed, ["comm.torch.build_shm_op"])
    # Workaround: on CPUs DeepSpeed compiles a shared-memory collective that training never calls. That takes a compiler
    # and up to a minute, and a process killed meanwhile leaves a lock at which every later start waits for ever.
    # Remove when it is built on first use (deepspeed 0.19.8, comm/torch.py).
    vars(backend)["build_shm_op"] = lambda: None
    return deepspeed


def _other_version(deepspeed: Any, missing: list[str]) -> PreflightError:
    return PreflightError(
        f"deepspeed {deepspeed.__version__} lacks {missing}",
        "the adapter was written for another version",
        "pip install 'deepspeed>=0.19.8,<0.20'",
    )


class Zero3Engine:
    """See `Engine`. Every rank passes the same whole module; it is split in place. Collective over dp."""

    replicated = False

    def __init__(self, module: nn.Module, config: OptimizerConfig, mesh: Mesh) -> None:
        deepspeed = import_deepspeed(mesh.device)
        if not dist.is_initialized():
            raise PreflightError("parallel.zero_stage = 3", "no process group was joined", "start with `unicom train`")
        self.module, self.config, self.mesh = module, config, mesh
        self.steps_done = 0
        trained_matrices, trained_vectors, frozen = decay_groups(module)
        groups = [
            {"params": [p for _, p in named], "weight_decay": decay}
            for named, decay in ((trained_matrices, config.weight_decay), (trained_vectors, 0.0))
            if named
        ]
        exact = {name: p.detach().clone().float() for name, p in module.named_parameters()}
        floats = {name: b.clone() for name, b in module.named_buffers() if b.is_floating_point()}
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=self._config())
        self._zero = self._engine.optimizer
        missing = [name for name in _NEEDED if not hasattr(self._zero, name)]
        if missing:
            raise _other_version(deepspeed, missing)
        for name, buffer in floats.items():  # DeepSpeed casts buffers too; position tables need their float32
            owner = module.get_submodule(name.rpartition(".")[0])
            owner._buffers[name.rpartition(".")[2]] = buffer.to(mesh.device)
        self._frozen: list[tuple[str, Any]] = list(frozen)
        self.fragments = self._locate([*trained_matrices, *trained_vectors], frozen)
        self._frozen_master = torch.zeros(sum(p.ds_tensor.ds_numel for _, p in self._frozen), device=mesh.device)
        self._set_exact(exact)

    def _config(self) -> dict[str, Any]:
        c = self.config
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": c.clip,
            "bf16": {"enabled": c.precision == "bfloat16"},
            "communication_data_type": "fp32",
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": PERSIST_ELEMENTS,
                "stage3_model_persistence_threshold": PERSIST_TOTAL,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 31,
        }

    def _locate(self, trained: list[tuple[str, Any]], frozen: list[tuple[str, Any]]) -> list[Fragment]:
        """Fragments of this rank: DeepSpeed cuts every flattened parameter into dp pieces of equal, padded size."""
        fragments, start = [], 0
        for number, (name, p) in enumerate([*trained, *frozen]):
            span, whole = p.ds_tensor.ds_numel, p.ds_numel
            offset = min(self.mesh.zero.rank * span, whole)
            if number < len(trained):
                group, where, _ = self._zero.grad_position[self._zero.get_param_id(p)]
            else:
                group, where = len(self._zero.fp32_partitioned_groups_flat), start
                start += span
            numel = min(span, whole - offset)
            fragments += fragments_of(pieces_of(name, p, tuple(p.ds_shape)), offset, numel, group, int(where))
        return fragments

    def _set_exact(self, exact: dict[str, Tensor]) -> None:
        """Master weights from the float32 values, which DeepSpeed rounded to bfloat16 on the way."""
        weights = self.state()["weight"]
        for f in self.fragments:
            values = exact[f.name].reshape(-1)[f.offset : f.offset + f.numel]
            weights[f.group].data[f.start : f.start + f.numel] = values
        self._refresh()

    def __call__(self, batch: Any, x: Tensor | None = None, chunk: int = 0) -> Any:
        return self._engine(batch) if x is None and not chunk else self._engine(batch, x, chunk)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        with self._engine.coalesce_grad_reduction():
            yield

    def backward(self, output: Tensor, grad: Tensor | None = None) -> None:
        self._engine.backward(output if grad is None else (output * grad).sum())

    def step(self, lr: float) -> float:
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        check_finite(float("nan") if self._zero.overflow else 0.0)
        self.steps_done += 1
        return float(self._zero._global_grad_norm)

    def _refresh(self) -> None:
        """Low-precision weights from the master weights, and the gathered small ones. Collective over dp."""
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].partition(self._zero.persistent_parameters)
        for number in range(len(self._zero.fp32_partitioned_groups_flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)
        frozen = len(self._zero.fp32_partitioned_groups_flat)
        located = {f.name: f for f in self.fragments if f.group == frozen}
        for name, p in self._frozen:
            f = located[name]
            p.ds_tensor.data[: f.numel].copy_(self._frozen_master[f.start : f.start + f.numel])
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def _moments(self, flat: Tensor) -> dict[str, Tensor]:
        state = self._zero.optimizer.state[flat]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), device=flat.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat.data), torch.zeros_like(flat.data)
        return state  # type: ignore[no-any-return]

    def state(self) -> dict[str, Buffers]:
        flats = list(self._zero.fp32_partitioned_groups_flat)
        state: dict[str, Buffers] = {"weight": [*(flat.data for flat in flats), self._frozen_master]}
        for kind in ("exp_avg", "exp_avg_sq"):
            state[kind] = [*(self._moments(flat)[kind] for flat in flats), self._frozen_master.new_empty(0)]
        return state

    def load_state(self, state: dict[str, Buffers], steps_done: int) -> None:
        for kind, buffers in self.state().items():
            for number, buffer in enumerate(buffers):
                if kind in state:
                    buffer.copy_(state[kind][number])
                else:
                    buffer.zero_()
        for flat in self._zero.fp32_partitioned_groups_flat:
            self._moments(flat)["step"].fill_(steps_done)
        self.steps_done = steps_done
        self._refresh()

    def close(self) -> None:
        self._engine.destroy()
