"""Counts what a rank sends: every collective of torch.distributed, whoever calls it, by operation.

A dispatch mode sees the operations themselves, so DeepSpeed's, Megatron's and our own calls count alike. Bytes are what
a bandwidth-optimal algorithm makes each of n ranks send: (n-1)/n of the whole for a gather, a scattered reduction or an
exchange, twice that for an all-reduce (Thakur et al. 2005); messages between two ranks count where they are sent.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = {  # operation of the dispatcher: (name, argument that holds the whole, times it is sent by all but one rank)
    "allreduce_": ("all-reduce", 0, 2.0),
    "_allgather_base_": ("all-gather", 0, 1.0),
    "allgather_": ("all-gather", 0, 1.0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0, 1.0),
    "_reduce_scatter_base_": ("reduce-scatter", 1, 1.0),
    "reduce_scatter_": ("reduce-scatter", 1, 1.0),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1, 1.0),
    "reduce_": ("reduce", 0, 1.0),
    "broadcast_": ("broadcast", 0, 1.0),
    "alltoall_base_": ("all-to-all", 1, 1.0),
    "alltoall_": ("all-to-all", 1, 1.0),
    "send": ("send", 0, 0.0),
}
SILENT = ("recv_", "recv_any_source_", "barrier", "monitored_barrier_")
SMALL = 64  # bytes: what is smaller is a norm, a count or an agreement, not data


@dataclass(frozen=True)
class Call:
    """One operation: its name, the ranks of its group (global), bytes sent, and whether autograd's backward made it."""

    name: str
    ranks: tuple[int, ...]
    sent: int
    backward: bool


class Communication(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block (of one thread) `calls` and `sent` add up, by operation; messages below `SMALL` as "small".

    `log` has every call of them in its order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.log: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._note(func, args)
        return func(*args, **(kwargs or {}))

    def _note(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        operation = func._schema.name.removeprefix("c10d::")  # type: ignore[attr-defined]
        if operation in SILENT:
            return
        name, position, times = NAMES[operation]
        whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors(args[position]))
        group = next(group for group in map(process_group, args) if group is not None)
        ranks = group.size()
        name = name if whole >= SMALL else "small"
        sent = round(whole * times * (ranks - 1) / ranks) if times else whole
        backward = torch._C._current_graph_task_id() >= 0
        self.calls[name] += 1
        self.sent[name] += sent
        self.log.append(Call(name, tuple(dist.get_process_group_ranks(group)), sent, backward))

    @property
    def bytes(self) -> int:
        """Sent by this rank altogether."""
        return sum(self.sent.values())


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of nested lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def process_group(value: Any) -> dist.ProcessGroup | None:
    """The process group in an argument of the dispatcher, if it is one."""
    if not isinstance(value, torch.ScriptObject):
        return None
    try:
        return dist.ProcessGroup.unbox(value)
    except RuntimeError:
        return None
