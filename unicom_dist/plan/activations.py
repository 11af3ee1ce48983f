"""Bytes that the forward pass of the prior keeps for the backward pass.

After Korthikanti et al. 2022 (arXiv 2205.05198), for grouped-query attention, SwiGLU and a fused attention kernel,
without dropout: per layer and position, in bfloat16, the two norms' inputs and outputs and the attention's result
(10 h), queries, keys and values (2 + 4 k/a) h, gate, up and their product 6 f, and a float32 per head.
A linear map whose weight is frozen passes gradients on but needs its input no more: of a frozen layer the norms'
outputs (4 h) and the product (2 f) are not kept, whatever is recomputed.
Symbols as in `parameters.py`; 2 bytes a number in bfloat16, 4 in float32.
"""

from dataclasses import dataclass

from unicom_dist.config.layout import Layout, Recompute
from unicom_dist.config.schema import PriorConfig, QueryConfig


@dataclass(frozen=True)
class Batch:
    """One micro-batch of a rank's data coordinate: positions, the share of them with a text label, how many a step.

    Of the positions, `drawn` are latents of the `images` to be drawn; only a guide asks for these.
    """

    positions: int
    text: float
    micro_batches: int
    drawn: int = 0
    images: int = 0


def layer_activations(prior: PriorConfig, recompute: Recompute, element: int = 2, *, frozen: bool = False) -> float:
    """Bytes per position kept between forward and backward of one layer, nothing divided among ranks."""
    h, a = prior.hidden, prior.heads
    if recompute == "full":
        return element * h
    kv = 2 * element * h * prior.kv_heads / a
    whole = 6 * element * h + kv + 3 * element * prior.ffn + 4 * a
    return whole - (2 * element * h + element * prior.ffn if recompute == "selective" or frozen else 0)


def rank_layer_activations(prior: PriorConfig, layout: Layout, element: int = 2, *, frozen: bool = False) -> float:
    """The same for a rank, per position of the whole micro-batch: tensor parallelism divides what is within attention
    and MLP, sequence parallelism the rest (inputs and outputs of the norms) too.
    """
    per_position = layer_activations(prior, layout.recompute, element, frozen=frozen)
    if layout.recompute == "full":
        between = per_position
    else:
        between = element * prior.hidden * (4 if layout.recompute == "none" and not frozen else 2)
    within = per_position - between
    cut = layout.tp if layout.sequence_parallel else 1
    return (within / layout.tp + between / cut) / layout.ulysses


def in_flight(layout: Layout, micro_batches: int, pp_rank: int) -> float:
    """Micro-batches whose activations a pipeline rank holds at most, in units of all its layers."""
    if layout.pp == 1:
        return 1.0
    if layout.schedule == "gpipe":
        return float(micro_batches)
    if layout.schedule == "interleaved":
        v = layout.pp_stages_per_rank
        warm = 2 * (layout.pp - pp_rank - 1) + (v - 1) * layout.pp + 1
        return min(micro_batches * v, warm) / v
    held = layout.pp if layout.schedule == "zero-bubble" else layout.pp - pp_rank
    return float(min(micro_batches, held))


def asking_positions(query: QueryConfig, batch: Batch) -> int:
    """What the frozen transformer computes on: queries in the places of the latents. All of it lies on the way of the
    queries' gradients, as the packed row is one tensor.
    """
    return batch.positions - batch.drawn + batch.images * query.queries


def decoder_layer_activations(prior: PriorConfig, query: QueryConfig, element: int = 2) -> float:
    """Bytes per position of one layer of the flow decoder: beside those of a layer, shifts, scales and gates (6 w), the
    scales + 1 (2 w), what the norms made before these (2 w), and what the gates multiply (2 w).
    """
    width = query.decoder_width
    return layer_activations(prior.of_width(width), "none", element) + 12 * element * width


def guide_activations(prior: PriorConfig, query: QueryConfig, batch: Batch, element: int = 2) -> float:
    """Bytes of a micro-batch in the layers of the guide, of which nothing is recomputed.

    The connector sees the queries of every image, the decoder these and the latents.
    """
    asked = batch.images * query.queries
    connector = query.connector_layers * layer_activations(prior.of_width(prior.hidden), "none", element)
    decoder = query.decoder_layers * decoder_layer_activations(prior, query, element)
    return connector * asked + decoder * (asked + batch.drawn)
