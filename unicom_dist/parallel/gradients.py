"""From reduced gradients to what the optimizer applies: partial sums over model ranks, global norm, clipping.

Every engine has its gradients averaged over `mesh.zero` in flat float32 buffers laid out as its weights (`Fragment`),
whole or in shards. What is left is the same arithmetic for all of them:
1. fragments whose piece says `sum_over` hold a part of the gradient: summed over the ranks that hold the same elements;
2. the norm over all owned elements of all ranks, ||g|| = sqrt(sum g^2): copies count once;
3. g *= clip / (||g|| + 1e-6) where the norm exceeds `clip` (Pascanu et al. 2013; the formula of `clip_grad_norm_`).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from unicom_dist.parallel.engine import Buffers, Fragment, check_finite
from unicom_dist.parallel.mesh import Axis, Mesh

WITHIN = {"tp": "tp", "kv": "tp", "tied": "pp"}  # the axis along which the holders of a partial gradient lie


@dataclass(frozen=True)
class Run:
    """`buffers[group][start:stop]`."""

    group: int
    start: int
    stop: int

    def of(self, buffers: Buffers) -> Tensor:
        """The view."""
        return buffers[self.group][self.start : self.stop]


def runs(fragments: Iterable[Fragment]) -> list[Run]:
    """The elements of `fragments`, neighbours joined, in the order of the buffers."""
    found: list[Run] = []
    for f in sorted(fragments, key=lambda f: (f.group, f.start)):
        if f.numel and found and (found[-1].group, found[-1].stop) == (f.group, f.start):
            found[-1] = Run(f.group, found[-1].start, f.start + f.numel)
        elif f.numel:
            found.append(Run(f.group, f.start, f.start + f.numel))
    return found


class Finish:
    """Built once per engine; called once per step on its gradients. `replicated` as in `Engine`.

    RuntimeError when ranks that should hold the same elements of a partial gradient do not. Both are collective over
    the world.
    """

    def __init__(self, mesh: Mesh, fragments: list[Fragment], replicated: bool, clip: float) -> None:
        self._mesh, self._clip = mesh, clip
        self._sums = _partial_sums(mesh, fragments)
        self._alone = mesh.everyone.size == (mesh.zero.size if replicated else 1)  # the norm is the same everywhere
        copies = replicated and mesh.zero.rank > 0
        self._owned = [] if copies and not self._alone else runs(f for f in fragments if f.piece.owner)

    def __call__(self, buffers: Buffers) -> float:
        """The global norm; `buffers` are summed and clipped in place. NonFiniteError on every rank together."""
        for axis, held in self._sums:
            parts = [part for part in held if buffers[part.group].numel()]  # frozen weights have no gradients
            if not parts:
                continue
            flat = torch.cat([part.of(buffers) for part in parts])
            axis.sum(flat)
            for part, values in zip(parts, torch.split(flat, [p.stop - p.start for p in parts]), strict=True):
                part.of(buffers).copy_(values)
        norm = self._norm(buffers)
        check_finite(norm)
        if self._clip and norm > self._clip:
            for buffer in buffers:
                buffer.mul_(self._clip / (norm + 1e-6))
        return norm

    def _norm(self, buffers: Buffers) -> float:
        views = [run.of(buffers) for run in self._owned if run.group < len(buffers) and buffers[run.group].numel()]
        norm = torch.nn.utils.get_total_norm(views) if views else torch.zeros(())
        if self._alone:
            return float(norm)
        return float(self._mesh.everyone.sum(norm.to(self._mesh.device, torch.float64).square()).sqrt())


def _partial_sums(mesh: Mesh, fragments: list[Fragment]) -> list[tuple[Axis, list[Run]]]:
    """For each kind of partial gradient held here, the ranks that hold the rest and where it lies."""
    sums = []
    for kind, axis in ((kind, getattr(mesh, name)) for kind, name in WITHIN.items()):
        mine = [f for f in fragments if f.piece.sum_over == kind and f.numel]
        holders = _holders(axis, mine)
        if not mine:
            continue
        if len(holders) < (axis.size if kind == "tp" else 2):
            raise RuntimeError(
                f"rank {mesh.rank}: the gradient of {mine[0].name} is to be summed over {kind!r}, but of the ranks"
                f" {axis.ranks} only {holders} hold the same elements of it"
            )
        sums.append((mesh.among(kind, holders), runs(mine)))
    return sums


def _holders(axis: Axis, mine: list[Fragment]) -> tuple[int, ...]:
    """Global ranks of `axis` whose fragments are the same elements as `mine`. Collective over `axis`."""
    if axis.size == 1:
        return axis.ranks
    elements = [(f.name, f.piece.begin, f.piece.cut, f.offset, f.numel) for f in mine]
    everyones: list[list[tuple[object, ...]]] = [[] for _ in axis.ranks]
    dist.all_gather_object(everyones, elements, group=axis.group)
    return tuple(rank for rank, theirs in zip(axis.ranks, everyones, strict=True) if theirs == elements)
