"""The trainings of an ablation: every variant with every seed, each a run directory of its own that resumes by itself.

run_dir/<variant>/seed-<n>/    config.yaml, metrics.jsonl, checkpoints/, weights/ … as `unicom train` leaves them
run_dir/logs/                  of the ranks, which are started once for all trainings that are not finished
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.explain import diff, write_config
from unicom_dist.config.load import Loaded, load_recipe, load_values
from unicom_dist.config.schema import Config, StageConfig
from unicom_dist.tracking.status import write_status
from unicom_dist.train.launch import joined, launch, threads_per_rank
from unicom_dist.train.pipeline import finished, prepare_vocabulary

DOCS = "docs/ablation.md"
ORIGIN = "unicom ablate"
# These change what is trained.
DECISIVE = ("seed", "data.path", "data.augmented_views", "encoder", "codec", "prior", "stages")
OBSERVING = ("log_every", "eval_every", "sample_every", "checkpoint_every")  # keys of a stage that do not


@dataclass(frozen=True)
class Variant:
    """A point of the grid: a name fit for a folder, and the dotted keys in which it differs from the recipe."""

    name: str
    overrides: Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One training: a variant with a seed. Its configuration has the stages that are trained, or that they need."""

    variant: Variant
    seed: int
    config: Config
    origins: Mapping[str, str]
    trained: tuple[str, ...]  # stages

    @property
    def name(self) -> str:
        """Of the training, among all of the ablation."""
        return f"{self.variant.name}-seed-{self.seed}"

    @property
    def stage(self) -> StageConfig:
        """The last that is trained: the one that is compared."""
        return self.config.stage(self.trained[-1])

    @property
    def folder(self) -> Path:
        """Its run directory."""
        return Path(self.config.run_dir)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints of the stage that is compared."""
        return self.folder / "checkpoints" / self.stage.name


def make_cells(
    loaded: Loaded, variants: Iterable[Variant], trained: Sequence[StageConfig], given: Sequence[StageConfig] = ()
) -> list[Cell]:
    """Every variant with each of `ablation.seeds` seeds, seed by seed within a variant. ConfigError: an illegal one.

    `given`: stages before those `trained` whose results every cell finds in its run directory.
    """
    base, names = loaded.config, tuple(stage.name for stage in trained)
    cells = []
    for variant in variants:
        for seed in range(base.seed, base.seed + base.ablation.seeds):
            place, own = f"{variant.name}/seed-{seed}", {**variant.overrides, "seed": seed}
            made = derived(loaded, (*given, *trained), f"{variant.name}, seed {seed}", place, own)
            cells.append(Cell(variant, seed, made.config, made.origins, names))
    return cells


def derived(
    loaded: Loaded, stages: Iterable[StageConfig], name: str, folder: str, overrides: Mapping[str, Any]
) -> Loaded:
    """The recipe with these stages alone and these dotted keys, in `folder` of its run directory. ConfigError."""
    base = loaded.config
    own = dict(overrides) | {
        "name": f"{base.name}, {name}",
        "run_dir": str(Path(base.run_dir) / folder),
        "tracking.mlflow": False,  # the ablation sends all of them
    }
    values = base.model_dump(mode="json") | {"stages": [stage.model_dump(mode="json") for stage in stages]}
    made = load_values(values, [f"{key}={json.dumps(value)}" for key, value in own.items()])
    return Loaded(made.config, dict(loaded.origins) | dict.fromkeys(own, ORIGIN), loaded.path)


def train(cells: Sequence[Cell], folder: Path, say: Callable[[str], None]) -> None:
    """Train the cells that are not finished; `say` receives a line for the user per event, logs go below `folder`.

    ConfigError: a cell was begun with other settings, or torchrun or srun started this process.
    Preempted: a signal asked to stop, the training in progress wrote a checkpoint; the same call continues.
    """
    if joined():
        raise ConfigError(
            "unicom ablate was started by torchrun or srun",
            "it starts the ranks of its trainings itself",
            "start it once, and say with parallel.nproc how many ranks a training has",
            DOCS,
        )
    todo = []
    for cell in cells:
        check_settings(cell.config)
        if finished(cell.config, cell.stage):
            say(f"{cell.name}: finished before, skipped")
        else:
            write_config(cell.folder, cell.config, cell.origins)
            if cell.stage.kind == "prior":
                prepare_vocabulary(cell.config)
            todo.append(cell)
    if not todo:
        return
    parallel = todo[0].config.parallel
    threads = threads_per_rank(parallel.nproc, parallel.threads)
    say(f"{len(todo)} of {len(cells)} trainings; ranks: {parallel.nproc}, threads of each: {threads}")
    launch([(cell.config, list(cell.trained)) for cell in todo], folder, parallel.nproc, threads)
    for cell in todo:
        write_status(cell.folder, "done", stage=cell.stage.name, step=cell.stage.steps, exit_code=0)


def check_settings(config: Config) -> None:
    """ConfigError when its run directory was begun with settings that train something else than those of now."""
    folder = Path(config.run_dir)
    if not (folder / "config.yaml").is_file():
        return
    for change in diff(load_recipe(folder).config, config):
        decisive = any(change.key == key or change.key.startswith(f"{key}.") for key in DECISIVE)
        if decisive and change.key.rpartition(".")[2] not in OBSERVING:
            raise ConfigError(
                f"{folder} was begun with {change.key} = {change.left}, the recipe now says {change.right}",
                "variants can be compared only when all were trained alike",
                "choose another run_dir for the new settings, or remove that folder",
                DOCS,
            )
