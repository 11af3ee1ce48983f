"""Bytes a rank needs for a step of the prior, by what they are for.

Activations after Korthikanti et al. 2022 (arXiv 2205.05198), for grouped-query attention, SwiGLU and a fused attention
kernel, without dropout: per layer and position, in bfloat16, the two norms' inputs and outputs and the attention's
result (10 h), queries, keys and values (2 + 4 k/a) h, gate, up and their product 6 f, and a float32 per head.
Symbols as in `parameters.py`; 2 bytes a number in bfloat16, 4 in float32.
"""

from dataclasses import dataclass

from unicom_dist.config.layout import Layout, Recompute
from unicom_dist.config.schema import PriorConfig
from unicom_dist.parallel.deepspeed_config import REDUCE_ELEMENTS
from unicom_dist.plan.parameters import Sizes, layer_parameters, pp_ranks, rank_parameters

CHUNK_LOGITS = 1 << 25  # of the language head, see parallel/cross_entropy.py


@dataclass(frozen=True)
class Batch:
    """One micro-batch of a rank's data coordinate: positions, the share of them with a text label, how many a step."""

    positions: int
    text: float
    micro_batches: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    parameters: int  # held by the slice, a count
    weights: int  # low precision, as forward and backward see them
    gradients: int  # those that live between micro-batches, and the reduced ones
    optimizer: int  # float32 master weights and two moments
    average: int  # EMA
    gathered: int  # ZeRO-3: whole weights at hand at one time, and the reduction's bucket
    activations: int
    head: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.table().values())

    def table(self) -> dict[str, int]:
        """By purpose, in the order of the step."""
        names = ("weights", "gradients", "optimizer", "average", "gathered", "activations", "head")
        return {name: getattr(self, name) for name in names}


def layer_activations(prior: PriorConfig, recompute: Recompute, element: int = 2) -> float:
    """Bytes per position kept between forward and backward of one layer, nothing divided among ranks."""
    h, a = prior.hidden, prior.heads
    if recompute == "full":
        return element * h
    kv = 2 * element * h * prior.kv_heads / a
    whole = 6 * element * h + kv + 3 * element * prior.ffn + 4 * a
    return whole - (2 * element * h + element * prior.ffn if recompute == "selective" else 0)


def rank_layer_activations(prior: PriorConfig, layout: Layout, element: int = 2) -> float:
    """The same for a rank, per position of the whole micro-batch: tensor parallelism divides what is within attention
    and MLP, sequence parallelism the rest (inputs and outputs of the norms) too.
    """
    per_position = layer_activations(prior, layout.recompute, element)
    if layout.recompute == "full":
        between = per_position
    else:
        between = element * prior.hidden * (4 if layout.recompute == "none" else 2)
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


def rank_memory(
    prior: PriorConfig, sizes: Sizes, layout: Layout, batch: Batch, pp_rank: int, precision: str = "bfloat16"
) -> Memory:
    """Of a rank at `pp_rank`; ranks of one pipeline coordinate need the same."""
    held, element = rank_parameters(prior, sizes, layout, pp_rank), 2 if precision == "bfloat16" else 4
    shards = layout.dp * layout.ulysses
    shard = -(-held // shards)
    weights, optimizer, average, gathered = element * held, 12 * shard, 4 * shard, 0
    gradients = element * held + 4 * shard  # added up over the micro-batches; reduced
    last = pp_rank == layout.pp - 1
    layers = sum(map(len, pp_ranks(prior, sizes, layout)[pp_rank]))
    if layout.zero_stage == 0:
        optimizer, average = 12 * held, 4 * held
        gradients = (element + 4) * held if element == 2 else 4 * held
        weights = element * held if element == 2 else 0  # the master weights themselves
    elif layout.zero_stage == 3:
        weights = element * shard
        whole = held if layout.gather_once else _working_set(prior, sizes, layout, last or pp_rank == 0)
        gathered = element * whole + 4 * REDUCE_ELEMENTS  # DeepSpeed allocates its bucket whole, at the start
    flight = in_flight(layout, batch.micro_batches, pp_rank)
    activations = rank_layer_activations(prior, layout, element) * batch.positions * layers * flight
    if layout.recompute == "full":
        one = Layout(tp=layout.tp, ulysses=layout.ulysses, sequence_parallel=layout.sequence_parallel)
        activations += rank_layer_activations(prior, one, element) * batch.positions  # the layer computed again
    return Memory(
        held,
        weights,
        gradients,
        optimizer,
        average,
        gathered,
        int(activations),
        _head(prior, sizes, layout, batch, element) if last else 0,
    )


def _working_set(prior: PriorConfig, sizes: Sizes, layout: Layout, at_an_end: bool) -> int:
    """Parameters gathered at one time: a layer and the next, or the vocabulary's table."""
    table = -(-sizes.vocabulary // layout.tp) * prior.hidden if at_an_end else 0
    return max(2 * layer_parameters(prior, layout.tp), table)


def _head(prior: PriorConfig, sizes: Sizes, layout: Layout, batch: Batch, element: int) -> int:
    """One chunk of logits twice (float32 and as multiplied), the weight's gradient until the backward pass."""
    rows = -(-sizes.vocabulary // layout.tp)
    labels = int(batch.positions * batch.text) // layout.ulysses
    chunk = min(CHUNK_LOGITS, labels * rows) * (4 + element if element == 2 else 4)
    in_flight_here = batch.micro_batches if layout.pp > 1 and layout.schedule == "gpipe" else 1
    return chunk + in_flight_here * element * rows * prior.hidden + 2 * element * labels * prior.hidden
