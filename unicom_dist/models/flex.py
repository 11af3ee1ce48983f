"""Attention over packed samples by FlexAttention: no padding between samples, hidden blocks of keys never touched.

What a query sees is computed from the segments for whole blocks at a time, never for single pairs: blocks without a
visible pair are skipped, blocks of visible pairs alone need no mask, and within the others three comparisons a pair
decide. Equal to `attention.visible`.
Shapes: S positions, H query heads and G key heads of K channels, n segments, m blocks.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from unicom_dist.models.segments import Segment

BLOCK = 128  # positions; the kernels' own
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # batch, head, query, key -> visible


class FlexPlan:
    """The same as an `AttentionPlan`, for GPUs. An `Attend`."""

    def __init__(self, mask: BlockMask, rule: tuple[Tensor, ...]) -> None:
        """Use `build`. rule: what the mask function reads."""
        self.mask, self._rule = mask, rule

    @classmethod
    def build(cls, segments: Sequence[Segment], device: torch.device | str = "cpu", block: int = BLOCK) -> "FlexPlan":
        """The plan of a batch: the block mask that `create_block_mask` would find by looking at every pair."""
        table = _table(segments)
        pairs = visible_pairs(table, block)
        length = int(table.length.sum())
        whole = pairs == block * block
        rule = _rule(table)
        mask = BlockMask.from_kv_blocks(
            *_ordered((pairs > 0) & ~whole),
            *_ordered(whole),
            BLOCK_SIZE=block,
            mask_mod=_sees(*rule),
            seq_lengths=(length, length),
        )
        return cls(mask, rule).to(device)

    def to(self, device: torch.device | str) -> "FlexPlan":
        """The same plan on `device`; as it is built on the CPU, that can be done beforehand."""
        if torch.device(device) == self._rule[0].device:
            return self
        mask, rule = self.mask.to(device), tuple(tensor.to(device, non_blocking=True) for tensor in self._rule)
        mask.mask_mod = _sees(*rule)
        return FlexPlan(mask, rule)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [S, H, K], key and value [S, G, K] -> [S, H, K]; the same for every layer."""
        heads = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        out: Tensor = _kernel(query.is_cuda)(*heads, block_mask=self.mask, enable_gqa=query.shape[1] != key.shape[1])
        return out[0].transpose(0, 1)


@lru_cache(maxsize=2)
def _kernel(compiled: bool) -> Any:
    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


class _Table:
    """Per segment: where it lies, of which sample, whether its positions see each other and nobody else sees them."""

    def __init__(self, length: Tensor, sample: Tensor, two_way: Tensor, hidden: Tensor) -> None:
        self.length, self.sample, self.two_way, self.hidden = length, sample, two_way, hidden
        self.stop = length.cumsum(0)
        self.start = self.stop - length


def _table(segments: Sequence[Segment]) -> _Table:
    rows = torch.tensor([(s.length, s.sample, s.mode != "causal", s.mode == "noise") for s in segments])
    length, sample, two_way, hidden = rows.reshape(-1, 4).unbind(1)
    return _Table(length, sample, two_way.bool(), hidden.bool())


def visible_pairs(table: _Table, block: int) -> Tensor:
    """How many query-key pairs see each other in each block of queries and keys: [m, m], queries first."""
    count = -(-int(table.length.sum()) // block)
    edges = torch.arange(count + 1) * block
    inside = torch.minimum(table.stop[:, None], edges[1:]) - torch.maximum(table.start[:, None], edges[:-1])
    inside = inside.clamp(min=0).double()  # [n, m] positions of a segment in a block; products are exact
    number = torch.arange(len(table.length))
    before = (table.sample[:, None] == table.sample) & (number[:, None] > number) & ~table.hidden
    earlier = before.double() @ inside  # [n, m] keys of a block that a segment sees before itself
    causal, square = inside[~table.two_way], inside[table.two_way]
    triangle = (causal.T @ causal).tril(-1) + torch.diag((causal * (causal + 1) / 2).sum(0))
    return (inside.T @ earlier + square.T @ square + triangle).long()


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each row of [m, m] are chosen, [1, 1, m], and which, these first, [1, 1, m, m]; both int32."""
    index = chosen.int().argsort(dim=1, descending=True, stable=True)
    return chosen.sum(1).int()[None, None], index.int()[None, None]


def _rule(table: _Table) -> tuple[Tensor, ...]:
    """Per position: the first and the last key that it may see, who alone sees it (-1: anybody), and its segment."""
    number = torch.arange(len(table.length)).repeat_interleave(table.length)
    position = torch.arange(len(number))
    together = table.sample[:, None] == table.sample
    first = table.start[together.int().argmax(1)][number]  # where the sample's first segment starts
    last = torch.where(table.two_way[number], table.stop[number] - 1, position)
    owner = torch.where(table.hidden[number], number, -1)
    return tuple(tensor.int() for tensor in (first, last, owner, number))


def _sees(first: Tensor, last: Tensor, owner: Tensor, segment: Tensor) -> MaskFunction:
    """FlexAttention's mask function: `_sees` of attention.py, in numbers per position."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        within = (key >= first[query]) & (key <= last[query])
        return within & ((owner[key] < 0) | (owner[key] == segment[query]))

    return sees
