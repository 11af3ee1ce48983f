"""How many parameters the prior has, in all and on one rank. Exact.

Symbols: h hidden, a query heads, k key-value heads, c channels per head, f MLP width, L layers, V vocabulary, d latent
channels, D feature channels, t tensor-parallel ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from unicom_dist.config.layout import Layout
from unicom_dist.config.schema import PriorConfig
from unicom_dist.parallel.pipeline.split import TIME_CHANNELS, by_rank, estimate, split


@dataclass(frozen=True)
class Sizes:
    """What the recipe does not say itself: tokens of the vocabulary, channels of latents and of encoder features."""

    vocabulary: int
    latent_channels: int
    feature_channels: int


def layer_parameters(prior: PriorConfig, tp: int = 1) -> int:
    """Of one backbone layer on a tensor-parallel rank: matrices cut in t, kv heads copied beyond k, norms whole."""
    h, c = prior.hidden, prior.hidden // prior.heads
    heads, kv_heads = prior.heads // tp, max(1, prior.kv_heads // tp)
    qkv = (h + 1) * (heads + 2 * kv_heads) * c
    return qkv + heads * c * h + 3 * h * (prior.ffn // tp) + 2 * h + 2 * c * prior.qk_norm


def layer_matrices(prior: PriorConfig) -> int:
    """Weights of a layer's matrices: what a position is multiplied with."""
    h, c = prior.hidden, prior.hidden // prior.heads
    return 2 * h * (prior.heads + prior.kv_heads) * c + 3 * h * prior.ffn


def entrance_parameters(prior: PriorConfig, sizes: Sizes, tp: int = 1) -> int:
    """Before the first layer: this rank's rows of the embedding, latents, time, connector."""
    h = prior.hidden
    latents = (sizes.latent_channels + 1) * h
    time = (TIME_CHANNELS + 1) * h + (h + 1) * h
    connector = (prior.read_channels(sizes.feature_channels, sizes.latent_channels) + 1) * h + (h + 1) * h
    return _rows(sizes, tp) * h + latents + time + connector


def exit_parameters(prior: PriorConfig, sizes: Sizes, own_head: bool, tp: int = 1) -> int:
    """After the last layer: norm, flow head, and (`own_head`) this rank's rows of the language head."""
    h = prior.hidden
    return h + h + (h + 1) * sizes.latent_channels + _rows(sizes, tp) * h * own_head


def _rows(sizes: Sizes, tp: int) -> int:
    return -(-sizes.vocabulary // tp)


def parameters(prior: PriorConfig, sizes: Sizes) -> int:
    """Of the whole model, tied weights counted once."""
    ends = entrance_parameters(prior, sizes) + exit_parameters(prior, sizes, not prior.tie_embeddings)
    return ends + prior.layers * layer_parameters(prior)


def pp_ranks(prior: PriorConfig, sizes: Sizes, layout: Layout) -> list[tuple[range, ...]]:
    """The layers of each pipeline rank, chunk by chunk, as training splits them."""
    costs = estimate(prior, sizes.vocabulary, sizes.latent_channels, sizes.feature_channels)
    return by_rank(split(costs, layout.pp_stages), layout.pp)


def rank_parameters(prior: PriorConfig, sizes: Sizes, layout: Layout, pp_rank: int) -> int:
    """Held by a rank's slice of the model, before ZeRO. A tied head is a copy where the embedding is elsewhere."""
    chunks: Sequence[range] = pp_ranks(prior, sizes, layout)[pp_rank]
    count = sum(map(len, chunks)) * layer_parameters(prior, layout.tp)
    if pp_rank == 0:
        count += entrance_parameters(prior, sizes, layout.tp)
    if pp_rank == layout.pp - 1:
        own_head = not prior.tie_embeddings or layout.pp > 1
        count += exit_parameters(prior, sizes, own_head, layout.tp)
    return count
