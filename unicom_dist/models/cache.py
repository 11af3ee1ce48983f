"""Keys and values of prefixes that were read once, for drawing and writing after them.

Shapes: P prefixes padded to L positions, n new positions after each, H query heads and G key heads of K channels, h
width.
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
    """What later positions need to know of P prefixes."""

    keys: list[Tensor]  # per layer [P, L, G, K]
    values: list[Tensor]  # per layer [P, L, G, K]
    bias: Tensor  # [P, 1, 1, L], hides the padding
    next_position: Tensor  # [P] int64, the rotary id that follows the prefix
    last_hidden: Tensor  # [P, h], the final hidden state at the prefix's end

    def select(self, index: Tensor | Sequence[int]) -> "Prefix":
        """The prefixes `index`, in that order; an index may repeat."""
        index = torch.as_tensor(index, device=self.bias.device)
        return Prefix(
            [key[index] for key in self.keys],
            [value[index] for value in self.values],
            self.bias[index],
            self.next_position[index],
            self.last_hidden[index],
        )


class Recorder:
    """Attends by a plan and keeps each layer's keys and values, sample by sample. An `Attend`."""

    def __init__(self, batch: PackedBatch, dtype: torch.dtype) -> None:
        device = batch.rope_positions.device
        lengths: dict[int, int] = {}
        for segment in batch.segments:
            lengths[segment.sample] = lengths.get(segment.sample, 0) + segment.length
        length = torch.tensor(list(lengths.values()), device=device)
        offset = torch.arange(int(length.max()), device=device)
        real = offset < length[:, None]
        self.last = length.cumsum(0) - 1
        self.where = torch.where(real, (self.last - length + 1)[:, None] + offset, 0)
        self.bias = torch.zeros(real.shape, dtype=dtype, device=device).masked_fill_(~real, float("-inf"))[
            :, None, None
        ]
        self.plan = AttentionPlan.build(batch.segments, dtype, device)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [S, H, K], key and value [S, G, K] -> [S, H, K]."""
        self.keys.append(key[self.where])
        self.values.append(value[self.where])
        return self.plan(layer, query, key, value)


class AfterPrefix:
    """n new positions after each prefix see the prefix and each other. An `Attend` over P x n flattened positions."""

    def __init__(self, prefix: Prefix, new: int) -> None:
        self.prefix, self.new = prefix, new
        self.bias = torch.cat([prefix.bias, prefix.bias.new_zeros(*prefix.bias.shape[:3], new)], -1)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [P n, H, K], key and value [P n, G, K] -> [P n, H, K]."""
        key = torch.cat([self.prefix.keys[layer], key.view(-1, self.new, *key.shape[1:])], 1)
        value = torch.cat([self.prefix.values[layer], value.view(-1, self.new, *value.shape[1:])], 1)
        self.keys.append(key)
        self.values.append(value)
        query = query.view(-1, self.new, *query.shape[1:]).transpose(1, 2)
        out = attend(query, key.transpose(1, 2), value.transpose(1, 2), self.bias)
        return out.transpose(1, 2).flatten(0, 1)

    def grown(self, last_hidden: Tensor) -> Prefix:
        """The prefixes with the new positions at their ends, after a pass through all layers; last_hidden [P, h]."""
        position = self.prefix.next_position + self.new
        return replace(
            self.prefix,
            keys=self.keys,
            values=self.values,
            bias=self.bias,
            next_position=position,
            last_hidden=last_hidden,
        )
