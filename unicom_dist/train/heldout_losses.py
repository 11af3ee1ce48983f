"""Losses on held-out data while a stage trains, with the averaged weights and, if asked for, with those as they are."""

from typing import TYPE_CHECKING, Any

from unicom_dist.parallel.engine import Buffers
from unicom_dist.train.execution import LossSums

if TYPE_CHECKING:
    from unicom_dist.train.loop import Run

TOGETHER = 8  # batches that are in the pipeline of a dp coordinate at a time


def heldout_losses(run: "Run") -> dict[str, float]:
    """Means by name: `loss/…` with the averaged weights, `loss_raw/…` with the others. {} without held-out data.

    Every dp coordinate takes its share of the batches. Collective over the world.
    """
    every = list(run.task.heldout())
    if not every:
        return {}
    values = _measured(run, every, run.ema.buffers, "loss")
    if run.config.eval.raw_weights and run.stage.ema:
        values |= _measured(run, every, run.engine.state()["weight"], "loss_raw")
    return values


def _measured(run: "Run", every: list[tuple[str, Any]], weights: Buffers, prefix: str) -> dict[str, float]:
    """Every rank runs equally many batches, if need be one of another's."""
    mesh, sums = run.mesh, LossSums()
    counts: dict[str, int] = {}
    for suffix, batch in every:
        for name, count in run.task.counts(batch).items():
            counts[name + suffix] = counts.get(name + suffix, 0) + count
    run.engine.module.eval()
    with run.engine.using(weights):
        for first in range(0, len(every), mesh.dp.size * TOGETHER):
            places = range(first + mesh.dp.rank, first + mesh.dp.size * TOGETHER, mesh.dp.size)
            mine = [every[place % len(every)] for place in places if place - mesh.dp.rank < len(every)]
            terms = run.execution.terms([batch.to(mesh.device) for _, batch in mine])
            for place, (suffix, _), found in zip(places, mine, terms, strict=False):
                if place < len(every):
                    sums.add({name + suffix: term for name, term in found.items()})
    run.engine.module.train()
    pairs = sums.take(list(counts), mesh)
    # The labels of samples that draw (with a suffix: the time) say little: where the image begins.
    names = [name for name, count in counts.items() if count and not (name.startswith("text") and "@" in name)]
    values = {f"{prefix}/{name}": pairs[name][0] / counts[name] for name in names}
    at_times: dict[str, list[float]] = {}
    for name, value in values.items():
        if "@" in name:
            at_times.setdefault(name.partition("@")[0], []).append(value)
    return values | {name: sum(found) / len(found) for name, found in at_times.items()}
