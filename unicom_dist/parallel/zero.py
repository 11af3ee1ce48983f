"""DeepSpeed's ZeRO behind the engine interface: what the ranks of `mesh.zero` split of a slice of the model.

Low-precision weights; float32 master weights, moments and reduced gradients. All forwards and backwards of a step come
first, in any order, as a pipeline has them; their gradients add up on the parameters (2 bytes per parameter of the
slice in bfloat16) and are reduced once (`coalesce_grad_reduction`, which needs gradient_accumulation_steps = 1).
`zero_shards.py` knows where DeepSpeed keeps what.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unicom_dist.config.errors import NonFiniteError, PreflightError
from unicom_dist.parallel.deepspeed_adapter import ORDER, Groups, backward_pass, check_settings, import_deepspeed
from unicom_dist.parallel.engine import Buffers, Gradients, OptimizerConfig, Root, check_finite
from unicom_dist.parallel.gradients import Finish
from unicom_dist.parallel.kernels import Kernels, adamw
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.parallel.zero_shards import GroupShards, Initial, ParameterShards


class ZeroEngine:
    """See `Engine`. `settings` is DeepSpeed's configuration (`deepspeed_config`); its stage decides what is split.

    The module's parameters hold their values, or they are on the meta device and `initial` gives their values one after
    the other. In stage 3 each is split before the next is asked for: beside the shards there is one whole tensor at a
    time. Every rank of `mesh.zero` passes the same.
    `gather_once` (stage 3): the slice's weights are gathered when a step begins and held until its last backward pass:
    once per step instead of twice per micro-batch. In that time they take 2 bytes per parameter of the slice in
    bfloat16 and 4 in float32, between steps nothing. Collective over `mesh.zero`.
    """

    replicated = False

    def __init__(
        self,
        module: nn.Module,
        config: OptimizerConfig,
        mesh: Mesh,
        settings: dict[str, Any],
        initial: Initial | None = None,
        gather_once: bool = False,
    ) -> None:
        deepspeed = import_deepspeed(mesh.device)
        if not dist.is_initialized():
            raise PreflightError("parallel.zero_stage > 0", "no process group was joined", "start with `unicom train`")
        self.module, self.config, self.mesh, self._gather_once = module, config, mesh, gather_once
        self.steps_done = 0
        self._stage = settings["zero_optimization"]["stage"]
        kind = ParameterShards if self._stage == 3 else GroupShards
        self._shards = kind(module, config, mesh)
        groups = Groups(mesh)
        check_settings(deepspeed, settings, groups)
        with contextlib.redirect_stdout(io.StringIO()):
            self._shards.prepare(deepspeed, settings, groups, initial)
            parameters = [
                {"params": [p for _, p in named], "weight_decay": config.weight_decay * decayed}
                for named, decayed in zip(self._shards.trained, self._shards.decayed, strict=True)
            ]
            on_host = "offload_optimizer" in settings["zero_optimization"]  # where apex has no kernel
            optimizer = adamw(parameters, config.betas, config.eps, Kernels() if on_host else config.kernels)
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, mpu=groups)
        self._zero = self._engine.optimizer
        self._shards.attach(deepspeed, self._zero)
        self.fragments = self._shards.fragments
        self._finish = Finish(mesh, self.fragments, self.replicated, config.clip)

    def __call__(self, batch: Any, x: Tensor | None = None, chunk: int = 0) -> Any:
        return self._engine(batch) if x is None and not chunk else self._engine(batch, x, chunk)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        self._shards.hold(self._gather_once)
        with self._engine.coalesce_grad_reduction():
            try:
                yield
            except BaseException:
                self._zero.zero_grad()  # nothing to reduce: the others may not come, and the error must be seen
                raise
            if self._gather_once:
                self._shards.release()
            self._shards.fill_missing()
        if self._stage == 3:
            ORDER.agree(self.mesh)

    def backward(self, roots: Root | Sequence[Root], gradients: Gradients = None) -> None:
        with backward_pass(self._engine):
            torch.autograd.backward(roots, gradients)  # type: ignore[arg-type]  # its signature does not mix kinds

    def gradients(self) -> Buffers:
        return self._shards.gradients()

    def step(self, lr: float) -> float:
        try:
            norm = self._finish(self.gradients())
        except NonFiniteError:
            self._zero.zero_grad()
            raise
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        check_finite(float("inf") if self._zero.overflow else norm)  # otherwise DeepSpeed has skipped the step
        self.steps_done += 1
        return norm

    @contextmanager
    def using(self, buffers: Buffers) -> Iterator[None]:
        self._shards.load(buffers)
        try:
            yield
        finally:
            self._shards.load(self._shards.weights())

    def _moments(self, flat: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._zero.optimizer.state[flat]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), device=flat.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat.data), torch.zeros_like(flat.data)
        return state

    def state(self) -> dict[str, Buffers]:
        frozen = self._shards.frozen_master.new_empty(0)
        moments = {
            kind: [*(self._moments(flat)[kind] for flat in self._shards.masters), frozen]
            for kind in ("exp_avg", "exp_avg_sq")
        }
        return {"weight": self._shards.weights(), **moments}

    def load_state(self, state: dict[str, Buffers], steps_done: int) -> None:
        for kind, buffers in self.state().items():
            for number, buffer in enumerate(buffers):
                if kind in state:
                    buffer.copy_(state[kind][number])
                else:
                    buffer.zero_()
        for flat in self._shards.masters:
            self._moments(flat)["step"].fill_(steps_done)
        for group in self._zero.optimizer.param_groups:
            group["step"] = steps_done  # apex's AdamW counts here
        self.steps_done = steps_done
        self._shards.load(self._shards.weights())

    def close(self) -> None:
        self._engine.destroy()
