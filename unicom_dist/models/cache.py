"""Keys and values of prefixes that were read once, for drawing and writing after them.

They lie in buffers with room behind the prefix, [prefix | new positions]: what is drawn or written is put into the room
in place, and attention reads one tensor that nobody had to put together.
Shapes: P prefixes padded to L positions in buffers of C >= L, n new positions after each, H query heads and G key heads
of K channels, h width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unicom_dist.models.attention import AttentionPlan
from unicom_dist.models.layers import attend
from unicom_dist.models.segments import PackedBatch


@dataclass(frozen=True, slots=True)
class Prefix:
    """What later positions need to know of P prefixes.

    Prefixes grown from one share its buffers: of several, the one grown last is valid.
    """

    keys: list[Tensor]  # per layer [P, G, C, K], L of them filled
    values: list[Tensor]  # per layer [P, G, C, K]
    bias: Tensor  # [P, 1, 1, L], hides the padding
    next_position: Tensor  # [P, ...] int64, the rotary id that follows the prefix
    last_hidden: Tensor  # [P, h], the final hidden state at the prefix's end
    padded: bool = True  # whether `bias` hides anything

    @property
    def length(self) -> int:
        """L."""
        return self.bias.shape[-1]

    def select(self, index: Tensor | Sequence[int]) -> "Prefix":
        """A copy of the prefixes `index`, in that order; an index may repeat."""
        index = torch.as_tensor(index, device=self.bias.device)
        return Prefix(
            [key[index] for key in self.keys],
            [value[index] for value in self.values],
            self.bias[index],
            self.next_position[index],
            self.last_hidden[index],
            self.padded,
        )

    def first(self, count: int) -> "Prefix":
        """The first prefixes, in the same buffers."""
        return Prefix(
            [key[:count] for key in self.keys],
            [value[:count] for value in self.values],
            self.bias[:count],
            self.next_position[:count],
            self.last_hidden[:count],
            self.padded,
        )

    def reserve(self, new: int) -> None:
        """Make room for so many positions behind the prefix: nothing to do where there is, else one copy."""
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                if old.shape[2] < self.length + new:
                    larger = old.new_empty(*old.shape[:2], self.length + max(new, self.length // 4), old.shape[3])
                    larger[:, :, : self.length] = old[:, :, : self.length]
                    buffers[layer] = larger


class Recorder:
    """Attends by a plan and keeps each layer's keys and values, sample by sample. An `Attend`."""

    def __init__(self, batch: PackedBatch, dtype: torch.dtype) -> None:
        device = batch.rope_positions.device
        lengths: dict[int, int] = {}
        for segment in batch.segments:
            lengths[segment.sample] = lengths.get(segment.sample, 0) + segment.length
        length = torch.tensor(list(lengths.values()), device=device)
        offset = torch.arange(max(lengths.values()), device=device)
        real = offset < length[:, None]
        self.last = length.cumsum(0) - 1
        self.where = torch.where(real, (self.last - length + 1)[:, None] + offset, 0)
        self.bias = torch.zeros(real.shape, dtype=dtype, device=device).masked_fill_(~real, float("-inf"))[
            :, None, None
        ]
        self.padded = len(set(lengths.values())) > 1
        self.plan = AttentionPlan.build(batch.segments, dtype, device)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [S, H, K], key and value [S, G, K] -> [S, H, K]."""
        self.keys.append(key[self.where].transpose(1, 2))
        self.values.append(value[self.where].transpose(1, 2))
        return self.plan(layer, query, key, value)

    def prefix(self, rope_positions: Tensor, hidden: Tensor) -> Prefix:
        """After a pass through all layers that ended in `hidden` [S, h]; rope_positions [S, ...]."""
        following = rope_positions[self.last] + 1
        return Prefix(self.keys, self.values, self.bias, following, hidden[self.last], self.padded)


class AfterPrefix:
    """n new positions after each prefix see the prefix and each other. An `Attend` over P x n flattened positions."""

    def __init__(self, prefix: Prefix, new: int) -> None:
        prefix.reserve(new)
        self.prefix, self.new, self.end = prefix, new, prefix.length + new
        self.bias = torch.cat([prefix.bias, prefix.bias.new_zeros(*prefix.bias.shape[:3], new)], -1)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [P n, H, K], key and value [P n, G, K] -> [P n, H, K]."""
        keys = self._put(self.prefix.keys[layer], key)
        values = self._put(self.prefix.values[layer], value)
        query = query.view(-1, self.new, *query.shape[1:]).transpose(1, 2)
        out = attend(query, keys, values, self.bias if self.prefix.padded else None)
        return out.transpose(1, 2).flatten(0, 1)

    def grown(self, last_hidden: Tensor) -> Prefix:
        """The prefixes with the new positions at their ends, after a pass through all layers; last_hidden [P, h]."""
        position = self.prefix.next_position + self.new
        return replace(self.prefix, bias=self.bias, next_position=position, last_hidden=last_hidden)

    def _put(self, buffer: Tensor, new: Tensor) -> Tensor:
        """Write [P n, G, K] behind the prefix; returns [P, G, L + n, K], a view of the buffer."""
        buffer[:, :, self.prefix.length : self.end] = new.view(-1, self.new, *new.shape[1:]).transpose(1, 2)
        return buffer[:, :, : self.end]
