"""Attention over packed samples: the definition (`visible`) and a fast form equal to it (`AttentionPlan`).

Samples of similar length are padded to a common length and attended as one batch, each with its own visibility; nothing
is computed between samples. A plan is built once per batch and used by every layer.
Shapes: S positions, H query heads and G key heads of K channels, B samples of a bucket padded to L.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from unicom_dist.models.kept import Kept
from unicom_dist.models.layers import attend
from unicom_dist.models.segments import Segment

SHORTEST_IN_BUCKET = 0.75  # of the longest: bounds the padding, keeps the buckets few


class Attend(Protocol):
    """How the queries of a layer meet keys and values; realised by a plan, a recorder of prefixes and a cache."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [S, H, K], key and value [S, G, K] -> [S, H, K]."""


class _Spread(NamedTuple):
    """Per position: number of its segment and of its sample, and whether its segment is two-way and hidden."""

    segment: Tensor
    sample: Tensor
    two_way: Tensor
    hidden: Tensor


def _spread(segments: Sequence[Segment]) -> _Spread:
    table = torch.tensor([(s.length, s.sample, s.mode != "causal", s.mode == "noise") for s in segments])
    table = table.reshape(-1, 4).to(torch.int64)
    number = torch.arange(len(segments)).repeat_interleave(table[:, 0])
    rows = table[number]
    return _Spread(number, rows[:, 1], rows[:, 2].bool(), rows[:, 3].bool())


def _sees(position: Tensor, s: _Spread) -> Tensor:
    """The visibility rule between positions of one sample: [..., L] fields -> [..., L, L], query by key."""
    together = s.segment[..., :, None] == s.segment[..., None, :]
    earlier = position[..., None, :] <= position[..., :, None]
    return (earlier | (together & s.two_way[..., None, :])) & (~s.hidden[..., None, :] | together)


def visible(segments: Sequence[Segment]) -> Tensor:
    """Which key (column) each query (row) sees, as a dense matrix: the definition every fast path is tested against.

    A query sees a key iff both are of one sample, and the key is not later or both are in one full or noise segment,
    and the key is not in a noise segment or both are in that one.

    Returns: [S, S] bool.
    """
    spread = _spread(segments)
    same_sample = spread.sample[:, None] == spread.sample[None, :]
    return same_sample & _sees(torch.arange(spread.sample.shape[0]), spread)


class Take(torch.autograd.Function):
    """x[index] for distinct indices; the backward pass writes rows instead of accumulating them one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        """x [S, h] -> [len(index), h]."""
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Zeros but for the rows taken."""
        (index,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.rows, grads[0].shape[1]).index_copy_(0, index, grads[0]), None


class Rearrange(torch.autograd.Function):
    """out[i] = x[forward[i]]; backward reads d_out at `backward`, the place in `out` of each row of x.

    Both ways are pure reads: index_select's own backward is a serial accumulation, 20x slower on a CPU. Rows of `out`
    beyond one copy of x (padding) receive gradients from nobody.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
        """x [S, ...] -> [len(forward), ...]."""
        ctx.save_for_backward(backward)
        return x.index_select(0, forward)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The inverse reading."""
        (backward,) = ctx.saved_tensors
        return grads[0].index_select(0, backward), None, None


def rearrange(x: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
    """x[forward], where `forward` holds every row of x, at the places `backward`; further entries are padding."""
    out: Tensor = Rearrange.apply(x, forward, backward)  # type: ignore[no-untyped-call]
    return out


class AttentionPlan:
    """Where each position goes in the padded batches, and what it sees there."""

    def __init__(self, buckets: list[tuple[int, int, Tensor | None]], gather: Tensor, scatter: Tensor) -> None:
        """Use `build`. buckets: (B, L, bias [B, 1, L, L]); gather [sum B L]: position; scatter [S]: padded place."""
        self.buckets, self.gather, self.scatter = buckets, gather, scatter

    @classmethod
    def build(
        cls, segments: Sequence[Segment], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> "AttentionPlan":
        """The plan of a batch; `dtype` is that of the queries."""
        spread = _spread(segments)
        lengths = torch.unique_consecutive(spread.sample, return_counts=True)[1]
        starts = lengths.cumsum(0) - lengths
        order = lengths.argsort(descending=True, stable=True).tolist()
        length_of = lengths.tolist()
        groups: list[list[int]] = []
        for sample in order:
            if not groups or length_of[sample] < SHORTEST_IN_BUCKET * length_of[groups[-1][0]]:
                groups.append([])
            groups[-1].append(sample)
        buckets: list[tuple[int, int, Tensor | None]] = []
        gathers, scatter, place = [], torch.empty(spread.sample.shape[0], dtype=torch.int64), 0
        for group in groups:
            size, longest = len(group), length_of[group[0]]
            offset = torch.arange(longest)
            index = torch.tensor(group)
            real = offset < lengths[index, None]
            gather = torch.where(real, starts[index, None] + offset, 0)
            sees = _sees(offset, _Spread(*(field[gather] for field in spread)))
            # A padded query sees itself alone: its softmax stays finite and its values and gradients touch nobody.
            sees = torch.where(real[:, :, None], sees & real[:, None, :], torch.eye(longest, dtype=torch.bool))
            bias = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, float("-inf"))
            buckets.append((size, longest, bias[:, None].to(device)))
            scatter[gather[real]] = (torch.arange(size)[:, None] * longest + offset)[real] + place
            gathers.append(gather.flatten())
            place += size * longest
        gather = torch.cat(gathers) if gathers else scatter
        return cls(buckets, gather.to(device), scatter.to(device))

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [S, H, K], key and value [S, G, K] -> [S, H, K]; the same for every layer."""
        if not self.buckets:
            return query
        heads, key_heads = query.shape[1], key.shape[1]
        joined = rearrange(torch.cat([query, key, value], 1), self.gather, self.scatter)
        outs, savings = [], []
        for (size, longest, bias), piece in zip(
            self.buckets, torch.split(joined, [size * longest for size, longest, _ in self.buckets]), strict=True
        ):
            piece = piece.view(size, longest, -1, query.shape[2]).transpose(1, 2)
            q, k, v = torch.split(piece, [heads, key_heads, key_heads], dim=1)
            with Kept() as kept:
                padded = attend(q, k, v, bias).transpose(1, 2)
            outs.append(padded.reshape(size * longest, heads, -1))
            savings.append((kept, padded))
        out = rearrange(torch.cat(outs), self.scatter, self.gather)
        # The kernels need their own result in the backward pass; the next product keeps `out`, the same numbers.
        place = 0
        for kept, padded in savings:
            rows = self.gather[place : place + padded.shape[0] * padded.shape[1]]
            place += len(rows)
            kept.replace(padded, partial(_padded, out.detach(), rows, padded.shape))
        return out


def _padded(out: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    return out.index_select(0, rows).view(shape)
