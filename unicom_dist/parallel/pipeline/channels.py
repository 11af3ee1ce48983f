"""Tensors from rank to rank of the pipeline axis: sends nobody waits for, receives posted before they are needed.

On GPUs every ordered pair of neighbours has a group of its own. The transfers of one NCCL communicator run one after
the other, so with a common one a receive that waits for its sender would hold up this rank's next send.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from unicom_dist.parallel.mesh import Axis


@dataclass(frozen=True)
class Boundary:
    """One of the tensors that pass between pp_stages. Only what is differentiable sends a gradient back."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    differentiable: bool = True


@dataclass(frozen=True)
class Arrival:
    """Buffers that are being filled."""

    tensors: list[Tensor]
    works: list[dist.Work]

    def wait(self) -> list[Tensor]:
        """The tensors. On a GPU the current stream waits, not this process."""
        for work in self.works:
            work.wait()
        return self.tensors


class Channels:
    """What this rank exchanges with others of `axis`; peers are named by their rank in it.

    From one rank to another, tensors arrive in the order of the sends, and the receives must be posted in it.
    Collective over the axis.
    """

    def __init__(self, axis: Axis, device: torch.device, pairs: Sequence[tuple[int, int]]) -> None:
        self._axis, self._device = axis, device
        self._groups: dict[tuple[int, int], dist.ProcessGroup] = {}
        self._sent: list[tuple[dist.Work, Tensor]] = []
        if device.type == "cuda":
            self._connect(pairs)

    def _connect(self, pairs: Sequence[tuple[int, int]]) -> None:
        """A group for every (source, target) with this rank in it; all ranks go through `pairs` in the same order.

        A communicator is made by its first transfer, where both ranks wait for each other: now, not in mid-schedule.
        """
        for pair in sorted(pairs):
            if self._axis.rank not in pair:
                continue
            ranks = [self._axis.ranks[member] for member in pair]
            self._groups[pair] = dist.new_group(ranks, use_local_synchronization=True)
            token = torch.zeros(1, device=self._device)
            if self._axis.rank == pair[0]:
                dist.send(token, ranks[1], group=self._groups[pair])
            else:
                dist.recv(token, ranks[0], group=self._groups[pair])

    def receive(self, source: int, boundaries: Sequence[Boundary]) -> Arrival:
        """Post buffers for these tensors."""
        group = self._groups.get((source, self._axis.rank), self._axis.group)
        tensors, works = [], []
        for boundary in boundaries:
            tensor = torch.empty(boundary.shape, dtype=boundary.dtype, device=self._device)
            if tensor.numel():  # an empty tensor is known without being sent
                works.append(_started(dist.irecv(tensor, self._axis.ranks[source], group=group)))
            tensors.append(tensor)
        return Arrival(tensors, works)

    def send(self, target: int, tensors: Sequence[Tensor]) -> None:
        """Start sending. A later send releases the memory when this is done (gloo tells no earlier than `finish`)."""
        group = self._groups.get((self._axis.rank, target), self._axis.group)
        self._sent = [(work, tensor) for work, tensor in self._sent if not work.is_completed()]
        for tensor in tensors:
            if tensor.numel():
                whole = tensor.detach().contiguous()
                self._sent.append((_started(dist.isend(whole, self._axis.ranks[target], group=group)), whole))

    def finish(self) -> None:
        """Wait until everything is sent."""
        for work, _ in self._sent:
            work.wait()
        self._sent = []


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank belongs to the group"
    return work
