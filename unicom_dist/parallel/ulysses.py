"""Ulysses: positions are split among ranks everywhere but within attention, where the heads are.

Before attention an all-to-all turns "all heads of my positions" into "my heads of all positions"; after it another one
turns back. Key-value heads fewer than ranks are copied, so that every rank has those its query heads read.
Ref: DeepSpeed-Ulysses, arXiv 2309.14509, section 3. Shapes: n positions here, U ranks, H query and G key heads of K.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unicom_dist.parallel.mesh import Axis


def heads_to_positions(axis: Axis, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """query [n, H, K], key and value [n, G, K] -> [n U, H/U, K] and [n U, max(G/U, 1), K], all of one exchange.

    Positions come in the order of the ranks. Collective over the axis, in forward and in backward.
    """
    if key.shape[1] < axis.size:
        key, value = (heads.repeat_interleave(axis.size // key.shape[1], 1) for heads in (key, value))
    parts = [heads.view(len(heads), axis.size, -1, heads.shape[-1]) for heads in (query, key, value)]
    mine = _exchange(torch.cat(parts, 2).transpose(0, 1), axis).flatten(0, 1)
    return list(torch.split(mine, [part.shape[2] for part in parts], 1))


def positions_to_heads(axis: Axis, heads: Tensor) -> Tensor:
    """[n U, H/U, K] -> [n, H, K]. Collective over the axis, in forward and in backward."""
    parts = heads.view(axis.size, -1, *heads.shape[1:])
    return _exchange(parts, axis).transpose(0, 1).flatten(1, 2)


def _exchange(x: Tensor, axis: Axis) -> Tensor:
    out: Tensor = _AllToAll.apply(x, axis)  # type: ignore[no-untyped-call]
    return out


class _AllToAll(torch.autograd.Function):
    """x[r] goes to rank r; out[r] came from rank r. Its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=axis.group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grads[0], ctx.axis), None  # type: ignore[no-untyped-call]
