"""Floating-point operations of forward and backward over packed samples, from counts alone.

A multiplication and an addition count as two: forward 2 per weight and position, backward twice that. Only query-key
pairs that see each other count.
Symbols: h hidden, a query heads, k key-value heads, c channels per head, f MLP width, V vocabulary, L layers.
Ref: Chowdhery et al. 2022 (PaLM), appendix B.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from unicom_dist.config.schema import PriorConfig
from unicom_dist.models.segments import Segment


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much of everything some samples hold. Operations are linear in all of these."""

    positions: int
    pairs: int  # of query and key that see each other
    labels: int
    latents: int
    features: int
    times: int = 0  # that have a position of their own


def visible_pairs(segments: Iterable[Segment]) -> int:
    """Query-key pairs that see each other, summed over the samples (equals `visible(segments).sum()`)."""
    pairs = 0
    sample, seen = -1, 0  # `seen`: positions of this sample that later segments see
    for segment in segments:
        if segment.sample != sample:
            sample, seen = segment.sample, 0
        n = segment.length
        pairs += n * seen + (n * (n + 1) // 2 if segment.mode == "causal" else n * n)
        if segment.mode != "noise":
            seen += n
    return pairs


def layer_weights(config: PriorConfig) -> int:
    """Weights of the matrices of one backbone layer: queries, keys, values, output and the gated MLP."""
    head_channels = config.hidden // config.heads
    attention = 2 * config.hidden * config.heads * head_channels + 2 * config.hidden * config.kv_heads * head_channels
    return attention + 3 * config.hidden * config.ffn


def transfusion_flops(
    config: PriorConfig,
    amounts: Amounts,
    *,
    vocabulary: int,
    latent_channels: int,
    feature_channels: int,
    time_channels: int = 256,
    backbone_frozen: bool = False,
) -> int:
    """Operations of forward and backward over samples of these amounts.

    6 per backbone weight and position (4 when the backbone is frozen: gradients pass through, its weights get none),
    12 L a c per visible pair, 6 V h per label, and the towers: input projections get no gradient for their input.
    """
    h, latents = config.hidden, amounts.latents
    per_weight = 4 if backbone_frozen else 6
    backbone = per_weight * amounts.positions * config.layers * layer_weights(config)
    attention = 12 * config.layers * h * amounts.pairs
    head = per_weight * amounts.labels * vocabulary * h
    latent_in = 4 * latents * latent_channels * h
    timed = latents if config.time_injection == "add" else amounts.times
    time_embedding = timed * (4 * time_channels * h + 6 * h * h)
    connector = amounts.features * (4 * feature_channels * h + 6 * h * h)
    flow_head = 6 * latents * h * latent_channels
    return backbone + attention + head + latent_in + time_embedding + connector + flow_head
