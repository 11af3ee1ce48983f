"""What the trainings of an ablation recorded: their curves, and the ablation's own metrics.jsonl.

There every training is a stage of the ablation, with the figures it was measured by, so that MLflow shows a parent run
with a nested run per training.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from unicom_dist.tracking.metrics import METRICS_FILE, Record, read_metrics
from unicom_dist.tracking.report.data import Points, Stage, collect_stages
from unicom_dist.train.ablation.cells import Cell

Found = TypeVar("Found")
KEPT = ("train", "eval", "params")


def read_stage(cell: Cell) -> Stage:
    """Curves and time of a training; empty where nothing was recorded."""
    name = cell.stage.name
    return collect_stages(read_metrics(cell.folder), [name]).get(name, Stage(name))


def by_variant(cells: Sequence[Cell], found: Iterable[Found]) -> dict[str, list[Found]]:
    """What was found of each cell, by its variant's name, a list of the seeds."""
    grouped: dict[str, list[Found]] = {}
    for cell, one in zip(cells, found, strict=True):
        grouped.setdefault(cell.variant.name, []).append(one)
    return grouped


def held_out(stage: Stage, name: str) -> Points:
    """The held-out curve of a training, the mean over the fixed times; empty where the quantity was not recorded."""
    times = [curve.heldout for key, curve in stage.curves.items() if key.startswith(f"{name}@")]
    return mean_curve(times) if times else []


def mean_curve(curves: Sequence[Points]) -> Points:
    """The mean of curves at the steps all of them have."""
    steps = sorted(set.intersection(*({step for step, _ in curve} for curve in curves)))
    return [(step, sum(dict(curve)[step] for curve in curves) / len(curves)) for step in steps]


def record(folder: Path, cells: Sequence[Cell], figures: Mapping[str, Mapping[str, float]]) -> None:
    """Append to the metrics.jsonl in `folder` the trainings that are not in it, with `figures` by cell and name."""
    known = {item.stage for item in read_metrics(folder) if item.kind == "stage"}
    lines = []
    for cell in cells:
        if cell.name in known:
            continue
        records = [r for r in read_metrics(cell.folder) if r.stage == cell.stage.name and r.kind in KEPT]
        step, now = cell.stage.steps, time.time()
        lines += [Record(cell.name, item.step, item.kind, item.values, item.time) for item in records]
        lines += [
            Record(cell.name, step, "params", {"seed": cell.seed, **cell.variant.overrides}, now),
            Record(cell.name, step, "eval", dict(figures[cell.name]), now),
            Record(cell.name, step, "stage", {"state": "done"}, now),
        ]
    if lines:
        with (folder / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write("".join(line.to_json() + "\n" for line in lines))
