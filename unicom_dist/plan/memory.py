"""Bytes a rank needs for a step of the prior, by what they are for.

Frozen parameters cost weights alone: low-precision ones and float32 masters, which the engines keep and ZeRO splits as
those of trained ones. They have neither gradients nor moments, and are their own average.
Symbols as in `parameters.py`; what is kept for the backward pass: `activations.py`.
"""

from dataclasses import dataclass

from unicom_dist.config.layout import Layout
from unicom_dist.config.schema import PriorConfig
from unicom_dist.parallel.deepspeed_config import REDUCE_ELEMENTS
from unicom_dist.plan.activations import Batch, asking_positions, guide_activations, in_flight, rank_layer_activations
from unicom_dist.plan.parameters import (
    EVERYTHING,
    Sizes,
    Trained,
    decoder_layer_parameters,
    layer_parameters,
    pp_ranks,
    rank_parts,
)

CHUNK_LOGITS = 1 << 25  # of the language head, see parallel/cross_entropy.py


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


def rank_memory(
    prior: PriorConfig,
    sizes: Sizes,
    layout: Layout,
    batch: Batch,
    pp_rank: int,
    precision: str = "bfloat16",
    trained: Trained = EVERYTHING,
) -> Memory:
    """Of a rank at `pp_rank`; ranks of one pipeline coordinate need the same."""
    found = rank_parts(prior, sizes, layout, pp_rank, trained.query)
    held, moved = sum(found.values()), sum(count for part, count in found.items() if part in trained)
    element = 2 if precision == "bfloat16" else 4
    shards = layout.dp * layout.ulysses
    shard, moved_shard = -(-held // shards), -(-moved // shards)
    weights, optimizer, average, gathered = element * held, 4 * shard + 8 * moved_shard, 4 * moved_shard, 0
    gradients = element * moved + 4 * moved_shard  # added up over the micro-batches; reduced
    last = pp_rank == layout.pp - 1
    if layout.zero_stage == 0:
        optimizer, average = 4 * held + 8 * moved, 4 * moved
        gradients = (element + 4) * moved if element == 2 else 4 * moved
        weights = element * held if element == 2 else 0  # the master weights themselves
    elif layout.zero_stage == 3:
        weights = element * shard
        whole = held if layout.gather_once else _working_set(prior, sizes, layout, trained, last or pp_rank == 0)
        gathered = element * whole + 4 * REDUCE_ELEMENTS  # DeepSpeed allocates its bucket whole, at the start
    return Memory(
        held,
        weights,
        gradients,
        optimizer,
        average,
        gathered,
        int(_activations(prior, sizes, layout, batch, pp_rank, element, trained)),
        _head(prior, sizes, layout, batch, element, trained) if last else 0,
    )


def _activations(
    prior: PriorConfig, sizes: Sizes, layout: Layout, batch: Batch, pp_rank: int, element: int, trained: Trained
) -> float:
    """Of this rank's layers, over all micro-batches in flight, and of the guide."""
    frozen, query = "backbone" not in trained, trained.query
    positions = batch.positions if query is None else asking_positions(query, batch)
    layers = sum(map(len, pp_ranks(prior, sizes, layout)[pp_rank]))
    each = rank_layer_activations(prior, layout, element, frozen=frozen)
    kept = each * positions * layers * in_flight(layout, batch.micro_batches, pp_rank)
    if layout.recompute == "full":
        one = Layout(tp=layout.tp, ulysses=layout.ulysses, sequence_parallel=layout.sequence_parallel)
        kept += rank_layer_activations(prior, one, element, frozen=frozen) * positions  # the layer computed again
    return kept if query is None else kept + guide_activations(prior, query, batch, element)


def _working_set(prior: PriorConfig, sizes: Sizes, layout: Layout, trained: Trained, at_an_end: bool) -> int:
    """Parameters gathered at one time: a layer and the next, or the vocabulary's table."""
    table = -(-sizes.vocabulary // layout.tp) * prior.hidden if at_an_end else 0
    largest = layer_parameters(prior, layout.tp)
    if trained.query is not None:
        connector = layer_parameters(prior.of_width(prior.hidden))
        largest = max(largest, connector, decoder_layer_parameters(prior, trained.query))
    return max(2 * largest, table)


def _head(prior: PriorConfig, sizes: Sizes, layout: Layout, batch: Batch, element: int, trained: Trained) -> int:
    """One chunk of logits twice (float32 and as multiplied), and what waits for the backward pass: the gradient of the
    weight, where it is trained, hidden states of the labels and their gradients. A guide's stage has none.
    """
    rows = -(-sizes.vocabulary // layout.tp)
    labels = int(batch.positions * batch.text) // layout.ulysses
    chunk = min(CHUNK_LOGITS, labels * rows) * (4 + element if element == 2 else 4)
    states = element * labels * prior.hidden
    if trained.query is not None:
        return chunk + states
    in_flight_here = batch.micro_batches if layout.pp > 1 and layout.schedule == "gpipe" else 1
    return chunk + in_flight_here * element * rows * prior.hidden * ("backbone" in trained) + 2 * states
