"""What the report reads of a run directory: curves, pictures, evaluation, configuration, environment.

A curve is one quantity of one stage, on training data (`train`) and held-out data (`heldout`), both as (step, value).
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unicom_dist.tracking.env import read_env
from unicom_dist.tracking.metrics import NUMERIC_KINDS, Record, read_metrics
from unicom_dist.tracking.rundir import RunConfig, read_config, run_folder
from unicom_dist.tracking.status import Status, read_status

Points = list[tuple[int, float]]


@dataclass
class Curve:
    """One quantity over the steps of a stage."""

    train: Points = field(default_factory=list)
    heldout: Points = field(default_factory=list)


@dataclass
class Stage:
    """One stage of a run: its curves by name, its time, and the last step recorded."""

    name: str
    curves: dict[str, Curve] = field(default_factory=dict)
    busy_s: float = 0.0
    last_step: int = 0
    state: str = ""  # "done" when it reached its end
    params: dict[str, Any] = field(default_factory=dict)  # as recorded last, for example `mfu_peak_flops_per_s`


@dataclass(frozen=True)
class Grid:
    """A picture grid: `kind` is prompts or reconstructions, `details` the JSON beside it.

    `step` is None for the pictures of an evaluation, which have names instead (samples/eval/heldout-prompts.png).
    """

    path: Path
    stage: str
    step: int | None
    kind: str
    details: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Everything a report shows of one run."""

    name: str
    folder: Path
    config: RunConfig
    env: dict[str, Any]
    status: Status | None
    stages: dict[str, Stage]
    grids: list[Grid]
    evaluation: dict[str, Any]
    started_s: float
    ended_s: float

    @property
    def busy_s(self) -> float:
        """Seconds during which records were written; pauses between starts of the run are left out."""
        return sum(stage.busy_s for stage in self.stages.values())


def load_run(run_dir: str | Path) -> Run:
    """Read a run directory; what is missing or damaged is empty. DataError when it is no run directory at all."""
    folder = run_folder(run_dir)
    config, records = read_config(folder), read_metrics(folder)
    sections = [s for s in config.values.get("stages") or [] if isinstance(s, dict) and "name" in s]
    kinds = {str(section["name"]): str(section.get("kind", "")) for section in sections}
    return Run(
        name=str(config.values.get("name") or folder.name),
        folder=folder,
        config=config,
        env=read_env(folder),
        status=read_status(folder),
        stages=collect_stages(records, list(kinds)),
        grids=find_grids(folder, kinds),
        evaluation=_json(folder / "eval.json"),
        started_s=records[0].time if records else 0.0,
        ended_s=records[-1].time if records else 0.0,
    )


def collect_stages(records: list[Record], planned: list[str]) -> dict[str, Stage]:
    """Stages in the order of the configuration, then of appearance; without those that recorded nothing."""
    stages = {name: Stage(name) for name in planned}
    last_time: dict[str, float] = {}
    gap_s = 600.0  # a longer silence is a pause, not work
    for record in records:
        stage = stages.setdefault(record.stage, Stage(record.stage))
        stage.last_step = max(stage.last_step, record.step)
        if record.kind == "stage":
            stage.state = str(record.values.get("state", ""))
        elif record.kind == "params":
            stage.params |= record.values
        longest_s = math.inf if stage.state == "done" else gap_s  # who ends a stage has worked on it until then
        if record.kind != "resume" and 0 < record.time - last_time.get(record.stage, math.inf) < longest_s:
            stage.busy_s += record.time - last_time[record.stage]
        last_time[record.stage] = record.time
        for name, value in record.values.items() if record.kind in NUMERIC_KINDS else ():
            curve = stage.curves.setdefault(name, Curve())
            (curve.heldout if record.kind == "eval" else curve.train).append((record.step, float(value)))
    return {name: stage for name, stage in stages.items() if stage.curves or stage.busy_s}


def find_grids(folder: Path, kinds: dict[str, str]) -> list[Grid]:
    """The pictures under samples/<stage>/, in the order of stages and steps; `kinds` of the planned stages, by name."""
    order = {name: number for number, name in enumerate(kinds)}
    grids = []
    for path in (folder / "samples").glob("*/*.png"):
        details = _json(path.with_suffix(".json"))
        stage = str(details.get("stage") or path.parent.name)
        digits = path.stem.partition("step-")[2]
        step = details.get("step")
        step = step if isinstance(step, int) else int(digits) if digits.isdecimal() else None
        rebuilt = kinds.get(stage) == "codec" or "reconstruction" in path.stem
        kind = details.get("kind") or ("reconstructions" if rebuilt else "prompts")
        grids.append(Grid(path, stage, step, str(kind), details))
    return sorted(grids, key=lambda g: (order.get(g.stage, len(order)), g.stage, g.kind, g.step or 0, _place(g.path)))


def _place(path: Path) -> tuple[bool, str]:
    """Among the grids of an evaluation: what was drawn from words before what was changed."""
    return path.stem == "edits", path.name


def _json(path: Path) -> dict[str, Any]:
    try:
        item = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return item if isinstance(item, dict) else {"rows": item}
