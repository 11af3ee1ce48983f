"""What the ZeRO engines need of DeepSpeed, and where its behaviour is changed: the only place that imports it.

Three workarounds, each for deepspeed 0.19.8, each checked at import so that another version is refused and not trusted:
no compilation of a collective that training never calls; the order check of ZeRO-3 within `mesh.zero`; the groups of
the mesh instead of the world.
"""

import contextlib
import gc
import hashlib
import importlib
import inspect
import io
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from unicom_dist.config.errors import ConfigError, PreflightError
from unicom_dist.config.layout import DOCS
from unicom_dist.parallel.mesh import Mesh

VERSIONS = "pip install 'deepspeed>=0.19.8,<0.20'"


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, imported late (seconds) and quietly: its messages go to the logger "DeepSpeed" at WARNING."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            import deepspeed
        except ImportError as error:
            raise PreflightError(
                "parallel.zero_stage > 0", f"DeepSpeed cannot be imported: {error}", VERSIONS, DOCS
            ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # torch 2.13 renamed the collectives that DeepSpeed calls; nothing a user could do about it.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    backend = importlib.import_module("deepspeed.comm.torch")
    if not hasattr(backend, "build_shm_op"):
        raise other_version(deepspeed, ["comm.torch.build_shm_op"])
    # Workaround: on CPUs DeepSpeed compiles a shared-memory collective that training never calls. That takes a compiler
    # and up to a minute, and a process killed meanwhile leaves a lock at which every later start waits for ever.
    # Remove when it is built on first use (deepspeed 0.19.8, comm/torch.py).
    vars(backend)["build_shm_op"] = lambda: None
    scope_order_check(deepspeed)
    gc.freeze()  # DeepSpeed collects garbage as it builds an engine; what was imported is none, and takes .3 s to walk
    return deepspeed


def other_version(deepspeed: Any, missing: list[str]) -> PreflightError:
    """The adapter relies on something that this version of DeepSpeed does not have."""
    return PreflightError(
        f"deepspeed {deepspeed.__version__} lacks {missing}", "the adapter was written for another version", VERSIONS
    )


class OrderCheck:
    """The orders in which ZeRO-3's modules ran on this rank since the last `agree`."""

    def __init__(self) -> None:
        self._seen = hashlib.sha256()

    def note(self, ids: list[int]) -> None:
        """Called by DeepSpeed with the modules or parameters of a forward and backward pass."""
        self._seen.update(repr(ids).encode())

    def agree(self, mesh: Mesh) -> None:
        """RuntimeError unless all ranks of `mesh.zero` ran the same. Collective over `mesh.zero`: 16 bytes."""
        digest = int.from_bytes(self._seen.digest()[:7], "big")
        self._seen = hashlib.sha256()
        if mesh.zero.size == 1:
            return
        both = mesh.zero.max(torch.tensor([digest, -digest], device=mesh.device)).tolist()
        if both != [digest, -digest]:
            raise RuntimeError(
                f"rank {mesh.rank}: the ranks {mesh.zero.ranks}, which gather each other's weights, ran their modules"
                " in different orders; every module has to run on every rank, also on zero rows"
            )


ORDER = OrderCheck()


def check_settings(deepspeed: Any, settings: dict[str, Any], groups: "Groups") -> None:
    """ConfigError when DeepSpeed does not accept `settings`; PreflightError when it cannot reach NVMe here."""
    try:
        deepspeed.DeepSpeedConfig(settings, groups)
    except (AssertionError, ValueError, deepspeed.DeepSpeedConfigError) as error:  # pydantic's are ValueErrors
        why = "DeepSpeed refuses it: " + " ".join(str(error).split())
        raise ConfigError("deepspeed.extra", why, "correct or remove the key", DOCS) from error
    if settings["zero_optimization"].get("offload_param", {}).get("device") != "nvme":
        return
    builder = deepspeed.accelerator.get_accelerator().create_op_builder("AsyncIOBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        raise PreflightError(
            "parallel.offload = nvme",
            "DeepSpeed reads and writes NVMe by asynchronous I/O that it compiles, and libaio was not found",
            "apt install libaio-dev (or name it in CFLAGS and LDFLAGS), or parallel.offload = cpu",
            DOCS,
        )


def scope_order_check(deepspeed: Any) -> None:
    """Let DeepSpeed's check of the module order note the order; `OrderCheck.agree` compares it once a step.

    Workaround: the original broadcasts over the whole world at every forward pass that is not the recorded one, so
    pipeline stages, which reach it at different times, wait for ever. Remove when the check takes a process group
    (deepspeed 0.19.8, runtime/zero/partitioned_param_coordinator.py).
    """
    coordinator = importlib.import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    name = "assert_ints_same_as_other_ranks"
    original = getattr(importlib.import_module("deepspeed.runtime.zero.utils"), name, None)
    replaced = getattr(coordinator, name, None)
    source = inspect.getsource(coordinator.PartitionedParameterCoordinator.reset_step)
    if original is None or replaced not in (original, ORDER.note) or source.count(f"{name}(") != 3:
        raise other_version(deepspeed, [f"partitioned_param_coordinator.{name}, called three times by reset_step"])
    setattr(coordinator, name, ORDER.note)


def number_alike(deepspeed: Any, mesh: Mesh) -> None:
    """Let the ranks of `mesh.zero` give the next parameters and modules equal numbers, as the order check needs.

    DeepSpeed counts on over all engines of a process, and ranks that held different pp_stages before have counted
    differently. Collective over `mesh.zero`.
    """
    init, modules = deepspeed.zero.Init, module_counter()
    if not isinstance(getattr(init, "param_id", None), int):
        raise other_version(deepspeed, ["zero.Init.param_id"])
    counts = torch.tensor([init.param_id, modules[0]], device=mesh.device)
    init.param_id, modules[0] = mesh.zero.max(counts).tolist()


def module_counter() -> list[int]:
    """The number that DeepSpeed's ZeRO-3 gives the next module, as the one item of the list in which it counts."""
    offload = importlib.import_module("deepspeed.runtime.zero.parameter_offload").DeepSpeedZeRoOffload
    defaults = getattr(getattr(offload, "_register_deepspeed_module", None), "__defaults__", None)
    if not (defaults and isinstance(defaults[0], list) and [type(n) for n in defaults[0]] == [int]):
        deepspeed = importlib.import_module("deepspeed")
        raise other_version(deepspeed, ["DeepSpeedZeRoOffload._register_deepspeed_module(…, count=[number])"])
    counter: list[int] = defaults[0]
    return counter


class Groups:
    """The `mpu` object that DeepSpeed asks for its process groups. To it the world is `mesh.zero` and nothing else.

    Norms and overflow over the other axes are not its business: `gradients.Finish` takes care of them.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._zero = mesh.zero

    def get_data_parallel_group(self) -> Any:
        """Over which gradients are averaged and state is split."""
        return self._zero.group

    def get_data_parallel_group_ranks(self) -> tuple[int, ...]:
        """Global ranks."""
        return self._zero.ranks

    def get_data_parallel_world_size(self) -> int:
        """Of `mesh.zero`."""
        return self._zero.size

    def get_data_parallel_rank(self) -> int:
        """Within `mesh.zero`."""
        return self._zero.rank

    def get_model_parallel_group(self) -> None:
        """None: no other ranks."""
        return

    def get_model_parallel_world_size(self) -> int:
        """One."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """The only one."""
        return 0

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


@contextlib.contextmanager
def backward_pass(engine: Any) -> Iterator[None]:
    """What `DeepSpeedEngine.backward` does around autograd, for roots that are not one scalar loss.

    DeepSpeed also follows bare `torch.autograd.backward`, but with several forwards in flight it misses the end of all
    backward passes except the first (deepspeed 0.19.8, runtime/base_optimizer.py).
    """
    engine._running_engine_backward = True
    try:
        yield
        engine._backward_epilogue()
    finally:
        engine._running_engine_backward = False
