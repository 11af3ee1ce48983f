"""The paper's claims about the prior, each with the comparisons of this ablation that bear on it."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from unicom_dist.evaluate.intervals import over_seeds_and_pictures
from unicom_dist.tracking.report.data import Points
from unicom_dist.train.ablation.drawing import METRICS, at
from unicom_dist.train.ablation.findings import Claim, Finding
from unicom_dist.train.ablation.pathway_grid import Arm

Tables = Mapping[str, Mapping[int, NDArray[np.float64]]]  # metric -> step -> values [seeds, pictures]
CHANCE = 0.5  # prompt retrieval of a prior that knows nothing, as before the first step
TRAINED_ON = METRICS[-1].name


def claims_of(arms: Sequence[Arm], tables: Mapping[str, Tables], flow: Mapping[str, Sequence[Points]]) -> list[Claim]:
    """All claims on which the arms have something to say. `tables` and `flow` (a curve per seed) by name of the arm."""
    whole = arms[-1]
    narrow = [arm for arm in arms if arm.pathway == whole.pathway and arm is not whole]
    pairs = [(a, b) for a in narrow for b in arms if (b.pathway, b.channels) == ("query_guided", a.channels)]
    claims = [
        Claim(
            "Pathway I, a transformer that reads and draws, converges faster than Pathway II, queries of a frozen one.",
            "UniCom, section 4.3 and figures 7 and 12: curves, no figures",
            tuple(f for a, b in pairs for f in (*_retrieval(a, b, tables), *_flow(a, b, flow))),
        ),
        Claim(
            "Compressed latents are learned faster than all channels of the encoder.",
            "UniCom, section 4.3.1 (5 times faster) and figure 6 (3.8 times)",
            tuple(f for a in narrow for f in (*_steps_saved(a, whole, tables), *_retrieval(a, whole, tables))),
        ),
    ]
    return [claim for claim in claims if claim.findings]


def _retrieval(left: Arm, right: Arm, tables: Mapping[str, Tables]) -> Iterator[Finding]:
    """`left` expected to draw better than `right` at every step that was measured, the last first."""
    for metric, table in reversed(list(tables[left.name].items())):
        for step, values in reversed(list(table.items())):
            difference = over_seeds_and_pictures(values - tables[right.name][metric][step])
            yield Finding(left.label, right.label, at(metric, step), "", difference, "above")


def _flow(left: Arm, right: Arm, flow: Mapping[str, Sequence[Points]]) -> Iterator[Finding]:
    """Held-out flow loss, which only priors over the same latents can be compared by, at all common steps."""
    curves = [[dict(curve) for curve in flow[arm.name]] for arm in (left, right)]
    steps = sorted(set.intersection(*(set(curve) for several in curves for curve in several)))
    for step in reversed(steps):
        differences = [[a[step] - b[step]] for a, b in zip(*curves, strict=True)]
        difference = over_seeds_and_pictures(differences)
        yield Finding(left.label, right.label, f"held-out flow loss at step {step}", "", difference, "below")


def _steps_saved(left: Arm, right: Arm, tables: Mapping[str, Tables]) -> Iterator[Finding]:
    """How much earlier than at its end `left` draws training captions as well as `right` does there, seed by seed.

    Nothing where `right` has not learned anything by then, or `left` does not come that far.
    """
    mine, other = tables[left.name][TRAINED_ON], tables[right.name][TRAINED_ON]
    end = max(other)
    levels = other[end].mean(1).tolist()
    if min(levels) <= CHANCE:
        return
    curves = [[(step, float(values[seed].mean())) for step, values in mine.items()] for seed in range(len(levels))]
    reached = [steps_to(curve, level) for curve, level in zip(curves, levels, strict=True)]
    saved = [[step - end] for step in reached if step is not None]
    if len(saved) < len(reached):
        return
    metric = f"steps until training captions are drawn as well as at step {end}"
    yield Finding(left.label, right.label, metric, "steps", over_seeds_and_pictures(saved), "below")


def steps_to(curve: Points, level: float) -> float | None:
    """The step at which a curve, which is at CHANCE before its first, reaches `level`; None if it never does."""
    before, reached = 0, CHANCE
    for step, value in curve:
        if value >= level:
            return before + (step - before) * max(0.0, level - reached) / (value - reached)
        before, reached = step, value
    return None
