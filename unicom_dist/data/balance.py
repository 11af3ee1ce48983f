"""Packed rows dealt to ranks and micro-batches, as many to each and with as even costs as can be had.

What a step holds is decided before (`packing`), so neither the number of ranks nor that of micro-batches changes it:
dealing says who computes which row. Costs are integers, so every rank comes to the same result.
Ref: Graham 1969, "Bounds on multiprocessing timing anomalies" (longest first, to the least loaded).
"""

from collections.abc import Sequence

from unicom_dist.data.samples import Layout
from unicom_dist.models.operations import Amounts, visible_pairs
from unicom_dist.models.segments import Segment


def amounts_of(layout: Layout) -> Amounts:
    """What a sample costs by."""
    read = sum(place.size for place in layout.images if place.use == "read")
    return Amounts(
        layout.length,
        visible_pairs(Segment(0, mode, length) for mode, length in layout.segments),
        len(layout.label_ids),
        sum(place.size for place in layout.images) - read,
        read,
        sum(place.timed for place in layout.images),
    )


def deal(costs: Sequence[int], ranks: int, micro_batches: int) -> list[list[list[int]]]:
    """[rank][micro-batch] -> numbers of its rows, ascending.

    Micro-batches are even within a rank, and the costliest of every rank come at the same time: where weights are
    gathered for each micro-batch, ranks wait for each other there. ValueError: rows do not divide among them.
    """
    dealt = []
    for mine in even_parts(costs, ranks):
        parts = even_parts([costs[row] for row in mine], micro_batches)
        rows = [[mine[n] for n in part] for part in parts]
        dealt.append(sorted(rows, key=lambda piece: (-sum(costs[row] for row in piece), piece)))
    return dealt


def even_parts(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Item numbers in `parts` parts of equally many, ascending in each.

    Greedy, then exchanges between the costliest part and any other for as long as one brings both closer together.
    """
    if len(costs) % parts:
        raise ValueError(f"{len(costs)} items do not divide among {parts} parts")
    room = len(costs) // parts
    held: list[list[int]] = [[] for _ in range(parts)]
    sums = [0] * parts
    for item in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        part = min((p for p in range(parts) if len(held[p]) < room), key=lambda p: (sums[p], p))
        held[part].append(item)
        sums[part] += costs[item]
    while _exchange(costs, held, sums):
        pass
    return [sorted(part) for part in held]


def _exchange(costs: Sequence[int], held: list[list[int]], sums: list[int]) -> bool:
    """Swap the two items that bring the costliest part and another one closest; False if none does."""
    top = max(range(len(held)), key=lambda p: (sums[p], -p))
    for other in sorted(range(len(held)), key=lambda p: (sums[p], p)):
        gap = sums[top] - sums[other]
        swaps = [
            (abs(gap - 2 * (costs[a] - costs[b])), i, j)
            for i, a in enumerate(held[top])
            for j, b in enumerate(held[other])
            if 0 < costs[a] - costs[b] < gap
        ]
        if swaps:
            _, i, j = min(swaps)
            moved = costs[held[top][i]] - costs[held[other][j]]
            held[top][i], held[other][j] = held[other][j], held[top][i]
            sums[top], sums[other] = sums[top] - moved, sums[other] + moved
            return True
    return False
