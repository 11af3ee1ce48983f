"""Layers to pp_stages, so that the slowest pp_stage is as fast as possible: it sets the pace of the whole pipeline.

The embedding and the input towers weigh on the first pp_stage, the head on the last; with a large vocabulary the head
costs as much as several layers. Imports no torch.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unicom_dist.config.errors import ConfigError

if TYPE_CHECKING:
    from unicom_dist.config.schema import PriorConfig

DOCS = "docs/parallelism.md"
TIME_CHANNELS = 256  # sinusoids of the time embedding


@dataclass(frozen=True)
class LayerCosts:
    """Time of forward and backward, in any unit: measured, or `estimate`d."""

    layers: Sequence[float]
    embedding: float = 0.0  # everything before the first layer
    head: float = 0.0  # everything after the last

    def of(self, layers: range) -> float:
        """A pp_stage of these layers, with the embedding or the head if it is at an end."""
        ends = self.embedding * (layers.start == 0) + self.head * (layers.stop == len(self.layers))
        return sum(self.layers[layers.start : layers.stop]) + ends


def estimate(
    prior: "PriorConfig",
    vocabulary: int,
    latent_channels: int,
    feature_channels: int,
    *,
    text: float = 0.5,
    images: float = 0.0,
    pairs: float = 0.0,
) -> LayerCosts:
    """Operations of forward and backward per position, as `tracking/flops.py` counts them for a batch.

    text: share of positions with a text label, images: with image features; the rest are latents. pairs: visible
    query-key pairs per position. Looking up an embedding costs nothing beside a matrix product.
    """
    h, latents = prior.hidden, max(0.0, 1.0 - text - images)
    head_channels = h // prior.heads
    weights = 2 * h * (prior.heads + prior.kv_heads) * head_channels + 3 * h * prior.ffn
    layer = 6.0 * weights + 12 * h * pairs
    towers = latents * (4 * latent_channels * h + 4 * TIME_CHANNELS * h + 6 * h * h)
    towers += images * (4 * prior.read_channels(feature_channels, latent_channels) * h + 6 * h * h)
    return LayerCosts([layer] * prior.layers, towers, 6.0 * h * (text * vocabulary + latents * latent_channels))


def split(costs: LayerCosts, pp_stages: int) -> list[range]:
    """Consecutive layers of every pp_stage, at least one each: the slowest is as fast as can be.

    Among such cuts the one with the smallest sum of squares, that is the most even. ConfigError when there are more
    pp_stages than layers.
    """
    count = len(costs.layers)
    if not 1 <= pp_stages <= count:
        raise ConfigError(
            f"{pp_stages} pp_stages (pp x pp_stages_per_rank) for {count} layers",
            "every pp_stage needs at least one layer",
            f"choose parallel.pp and parallel.pp_stages_per_rank with a product of 1 to {count}",
            DOCS,
        )
    slowest, _ = _cheapest(count, pp_stages, costs.of, max)
    limit = slowest * (1 + 1e-9)  # the same sum in another order of additions

    def square(layers: range) -> float:
        return costs.of(layers) ** 2 if costs.of(layers) <= limit else math.inf

    return _cheapest(count, pp_stages, square, operator.add)[1]


def by_rank(pp_stages: Sequence[range], ranks: int) -> list[tuple[range, ...]]:
    """By rank: the layers of its chunks; chunk c of rank r is pp_stage c * ranks + r."""
    return [tuple(pp_stages[rank::ranks]) for rank in range(ranks)]


def _cheapest(
    count: int, parts: int, cost: Callable[[range], float], combine: Callable[[float, float], float]
) -> tuple[float, list[range]]:
    """The cut of `count` layers into `parts` whose combined cost is least, by dynamic programming over prefixes."""
    best: list[tuple[float, list[range]]] = [(cost(range(end)), [range(end)]) for end in range(1, count + 1)]
    for part in range(1, parts):
        longer = []
        for end in range(part + 1, count + 1):  # best[n] is of n + part layers in `part` parts
            options = []
            for begin in range(part, end):
                value, ranges = best[begin - part]
                options.append((combine(value, cost(range(begin, end))), [*ranges, range(begin, end)]))
            longer.append(min(options, key=lambda option: option[0]))
        best = longer
    return best[-1]
