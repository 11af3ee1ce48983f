"""How many parameters the prior has, in all and on one rank, and which of them a stage trains. Exact.

Parts have the names of the modules. Symbols: h hidden, a query heads, k key-value heads, c channels per head, f MLP
width, L layers, V vocabulary, d latent channels, D feature channels, t tensor-parallel ranks; of a guide, M queries and
w the width of its decoder.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from unicom_dist.config.layout import Layout
from unicom_dist.config.schema import PriorConfig, QueryConfig, StageConfig
from unicom_dist.parallel.pipeline.split import TIME_CHANNELS, by_rank, estimate, split


@dataclass(frozen=True)
class Sizes:
    """What the recipe does not say itself: tokens of the vocabulary, channels of latents and of encoder features."""

    vocabulary: int
    latent_channels: int
    feature_channels: int


@dataclass(frozen=True)
class Trained:
    """What a prior stage trains. With a `query` the guide is there too, and alone is trained."""

    part: Literal["all", "connector"] = "all"
    query: QueryConfig | None = None

    @classmethod
    def of(cls, stage: StageConfig) -> Self:
        """Of a prior stage."""
        part: Literal["all", "connector"] = "connector" if stage.trainable == "connector" else "all"
        return cls(part, stage.query if stage.query.enabled else None)

    def __contains__(self, part: str) -> bool:
        """Whether the parameters of `part` are trained."""
        if self.query is not None:
            return part.startswith("guide.")
        return self.part == "all" or part != "backbone"


EVERYTHING = Trained()


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


def entrance_parameters(prior: PriorConfig, sizes: Sizes, tp: int = 1) -> dict[str, int]:
    """By part, before the first layer: this rank's rows of the embedding, latents, time, connector."""
    h = prior.hidden
    return {
        "backbone": _rows(sizes, tp) * h,
        "latent_in": (sizes.latent_channels + 1) * h,
        "time": _time(h),
        "connector": (prior.read_channels(sizes.feature_channels, sizes.latent_channels) + 1) * h + (h + 1) * h,
    }


def exit_parameters(prior: PriorConfig, sizes: Sizes, own_head: bool, tp: int = 1) -> dict[str, int]:
    """By part, after the last layer: norm and (`own_head`) this rank's rows of the language head; flow head."""
    h = prior.hidden
    return {"backbone": h + _rows(sizes, tp) * h * own_head, "flow_head": _flow_head(h, sizes)}


def decoder_layer_parameters(prior: PriorConfig, query: QueryConfig) -> int:
    """Of a layer of a guide's flow decoder: with shifts, scales and gates."""
    w = query.decoder_width
    return layer_parameters(prior.of_width(w)) + (w + 1) * 6 * w


def guide_parameters(prior: PriorConfig, sizes: Sizes, query: QueryConfig | None) -> dict[str, int]:
    """By part: queries, connector, flow decoder. Empty without a query."""
    if query is None:
        return {}
    h, w = prior.hidden, query.decoder_width
    connector = query.connector_layers * layer_parameters(prior.of_width(h))
    ends = (sizes.latent_channels + 1) * w + _time(w) + _flow_head(w, sizes)
    return {
        "guide.queries": query.queries * h,
        "guide.connector": connector + (h + 1) * w + (w + 1) * w + w,
        "guide.decoder": query.decoder_layers * decoder_layer_parameters(prior, query) + ends,
    }


def _rows(sizes: Sizes, tp: int) -> int:
    return -(-sizes.vocabulary // tp)


def _time(width: int) -> int:
    return (TIME_CHANNELS + 1) * width + (width + 1) * width


def _flow_head(width: int, sizes: Sizes) -> int:
    return width + (width + 1) * sizes.latent_channels


def parts(prior: PriorConfig, sizes: Sizes, query: QueryConfig | None = None) -> dict[str, int]:
    """Parameters of the whole model by part, tied weights counted once."""
    found = Counter(entrance_parameters(prior, sizes))
    found.update({"backbone": prior.layers * layer_parameters(prior)})
    found.update(exit_parameters(prior, sizes, not prior.tie_embeddings))
    found.update(guide_parameters(prior, sizes, query))
    return dict(found)


def parameters(prior: PriorConfig, sizes: Sizes, query: QueryConfig | None = None) -> int:
    """Of the whole model."""
    return sum(parts(prior, sizes, query).values())


def pp_ranks(prior: PriorConfig, sizes: Sizes, layout: Layout) -> list[tuple[range, ...]]:
    """The layers of each pipeline rank, chunk by chunk, as training splits them."""
    costs = estimate(prior, sizes.vocabulary, sizes.latent_channels, sizes.feature_channels)
    return by_rank(split(costs, layout.pp_stages), layout.pp)


def rank_parts(
    prior: PriorConfig, sizes: Sizes, layout: Layout, pp_rank: int, query: QueryConfig | None = None
) -> dict[str, int]:
    """Held by a rank's slice of the model, before ZeRO, by part.

    A tied head is a copy where the embedding is elsewhere. A guide is not split.
    """
    chunks: Sequence[range] = pp_ranks(prior, sizes, layout)[pp_rank]
    found = Counter({"backbone": sum(map(len, chunks)) * layer_parameters(prior, layout.tp)})
    if pp_rank == 0:
        found.update(entrance_parameters(prior, sizes, layout.tp))
    if pp_rank == layout.pp - 1:
        own_head = not prior.tie_embeddings or layout.pp > 1
        found.update(exit_parameters(prior, sizes, own_head, layout.tp))
    found.update(guide_parameters(prior, sizes, query))
    return dict(found)


def rank_parameters(
    prior: PriorConfig, sizes: Sizes, layout: Layout, pp_rank: int, query: QueryConfig | None = None
) -> int:
    """Held by a rank's slice of the model."""
    return sum(rank_parts(prior, sizes, layout, pp_rank, query).values())
