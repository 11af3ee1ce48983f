"""Attention over packed samples by FlexAttention: no padding between samples, hidden blocks of keys never touched.

What a query sees is computed from the segments for whole blocks at a time, never for single pairs: blocks without a
visible pair are skipped, blocks of visible pairs alone need no mask, and within the others three comparisons a pair
decide. Equal to `attention.visible`.
Shapes: S positions, H query heads and G key heads of K channels, n segments, m blocks.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from unicom_dist.models.segments import Segment

BLOCK = 128  # positions; the kernels' own
Numbers = npt.NDArray[Any]
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
        pairs = _visible_pairs(table, block)
        whole = pairs == block * block
        some = (pairs > 0) & ~whole
        length = int(table.length.sum())
        rule = _rule(table)
        some_keys, some_queries, all_keys, all_queries = (_ordered(chosen) for chosen in (some, some.T, whole, whole.T))
        mask = BlockMask(
            seq_lengths=(length, length),
            kv_num_blocks=some_keys[0],
            kv_indices=some_keys[1],
            full_kv_num_blocks=all_keys[0],
            full_kv_indices=all_keys[1],
            q_num_blocks=some_queries[0],
            q_indices=some_queries[1],
            full_q_num_blocks=all_queries[0],
            full_q_indices=all_queries[1],
            BLOCK_SIZE=(block, block),
            mask_mod=_sees(*rule),
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


class _Table(NamedTuple):
    """Per segment: where it lies, its sample, whether its positions see each other and nobody else sees them."""

    start: Numbers
    length: Numbers
    sample: Numbers
    two_way: Numbers
    hidden: Numbers


def _table(segments: Sequence[Segment]) -> _Table:
    rows = [(s.length, s.sample, s.mode != "causal", s.mode == "noise") for s in segments]
    length, sample, two_way, hidden = np.array(rows, np.int64).reshape(-1, 4).T
    return _Table(length.cumsum() - length, length, sample, two_way.astype(bool), hidden.astype(bool))


def visible_pairs(table: _Table, block: int) -> Tensor:
    """How many query-key pairs see each other in each block of queries and keys: [m, m], queries first."""
    return torch.from_numpy(_visible_pairs(table, block))


def _visible_pairs(table: _Table, block: int) -> Numbers:
    edges = np.arange(-(-int(table.length.sum()) // block) + 1) * block
    stop = table.start + table.length
    inside = np.minimum(stop[:, None], edges[1:]) - np.maximum(table.start[:, None], edges[:-1])
    inside = inside.clip(min=0).astype(np.float64)  # [n, m] positions of a segment in a block; products are exact
    number = np.arange(len(table.length))
    before = (table.sample[:, None] == table.sample) & (number[:, None] > number) & ~table.hidden
    earlier = before.astype(np.float64) @ inside  # [n, m] keys of a block that a segment sees before itself
    causal, square = inside[~table.two_way], inside[table.two_way]
    triangle = np.tril(causal.T @ causal, -1) + np.diag((causal * (causal + 1) / 2).sum(0))
    pairs: Numbers = (inside.T @ earlier + square.T @ square + triangle).astype(np.int64)
    return pairs


def _ordered(chosen: Numbers) -> tuple[Tensor, Tensor]:
    """How many of each row of [m, m] are chosen, [1, 1, m], and which, these first, [1, 1, m, m]; both int32."""
    index = np.argsort(~chosen, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(chosen.sum(1, dtype=np.int32))[None, None], torch.from_numpy(index)[None, None]


def _rule(table: _Table) -> tuple[Tensor, ...]:
    """Per position: the first and the last key that it may see, who alone sees it (-1: anybody), and its segment."""
    number = np.repeat(np.arange(len(table.length)), table.length)
    position = np.arange(len(number))
    begins = np.concatenate([[True], table.sample[1:] != table.sample[:-1]])[: len(table.length)]
    first = table.start[np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))][number]
    last = np.where(table.two_way[number], (table.start + table.length)[number] - 1, position)
    owner = np.where(table.hidden[number], number, -1)
    return tuple(torch.from_numpy(values.astype(np.int32)) for values in (first, last, owner, number))


def _sees(first: Tensor, last: Tensor, owner: Tensor, segment: Tensor) -> MaskFunction:
    """FlexAttention's mask function: `_sees` of attention.py, in numbers per position."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        within = (key >= first[query]) & (key <= last[query])
        return within & ((owner[key] < 0) | (owner[key] == segment[query]))

    return sees
