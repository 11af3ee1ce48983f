"""`unicom ablate pathway`: the priors of `pathway_grid`, trained and measured alike, and the page about them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.explain import write_config
from unicom_dist.config.load import Loaded, load_values
from unicom_dist.config.schema import Config, StageConfig
from unicom_dist.data.pairs import feature_channels, open_set
from unicom_dist.evaluate.intervals import over_seeds_and_pictures
from unicom_dist.evaluate.judge import Embed
from unicom_dist.tracking.env import write_env
from unicom_dist.tracking.mirror import start_mirror
from unicom_dist.tracking.report.data import Stage
from unicom_dist.tracking.report.document import write_page
from unicom_dist.tracking.status import write_status
from unicom_dist.train import pipeline
from unicom_dist.train.ablation import pathway_page
from unicom_dist.train.ablation.cells import DOCS, ORIGIN, Cell, Variant, make_cells, train
from unicom_dist.train.ablation.drawing import METRICS, STRIP, at, measure
from unicom_dist.train.ablation.journal import held_out, mean_curve, read_stage, record
from unicom_dist.train.ablation.measured import Measured, strip_of
from unicom_dist.train.ablation.pathway_claims import claims_of
from unicom_dist.train.ablation.pathway_grid import Arm, arms_of

RESULT, PAGE, SHEET = "ablation.json", "ablation.html", "samples/ablation/sheet.png"
FLOW = "loss/flow"


def run(loaded: Loaded, run_latents: pipeline.Runner, say: Callable[[str], None], embed: Embed | None = None) -> Path:
    """Train what is not trained, measure what is not measured, write the result. Returns the path of the page.

    Everything is in `run_dir`: a folder per codec and per training, `ablation.json`, `ablation.html` and the sheet of
    pictures. `run_latents` as for `train.pipeline.run`; `say` receives a line for the user per event; `embed`: another
    judge than the recipe's. Raises whatever ended it, with the status written.
    """
    config, folder = loaded.config, Path(loaded.config.run_dir)
    given, trained = stages_of(config)
    arms = arms_of(config, feature_channels(open_set(config, "train"), config.encoder.kind))
    variants = [Variant(arm.name, arm.overrides(config, trained[-1].name)) for arm in arms]
    cells = make_cells(loaded, variants, trained, given)
    pipeline.preflight(config)
    write_config(folder, config, loaded.origins)
    write_env(folder)
    write_status(folder, "running")
    start_mirror(folder, config.tracking)
    try:
        for arm in {arm.codec: arm for arm in arms}.values():
            train_codec(loaded, arm, given, run_latents, say)
        for cell in cells:
            share_codec(folder / next(arm.codec for arm in arms if arm.name == cell.variant.name), cell)
        train(cells, folder, say)
        measured, originals = measure(cells, config, say, embed)
        record(folder, cells, {cell.name: one.means() for cell, one in zip(cells, measured, strict=True)})
        result = summary(config, arms, cells, measured, [caption for caption, _ in originals])
        write_page(folder / RESULT, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        strips = {cell.variant.name: strip_of(cell.folder / STRIP) for cell in reversed(cells)}  # of the first seed
        (folder / SHEET).parent.mkdir(parents=True, exist_ok=True)
        pictures: list[Image.Image] = [picture for _, picture in originals]
        pathway_page.sheet(result, pictures, strips).save(folder / SHEET)
        write_page(folder / PAGE, pathway_page.render(result, folder / SHEET, folder))
    except BaseException as error:
        pipeline.final_status(config, error)
        raise
    write_status(folder, "done", stage=trained[-1].name, step=trained[-1].steps, exit_code=0)
    return folder / PAGE


def stages_of(config: Config) -> tuple[list[StageConfig], list[StageConfig]]:
    """The stages that make the latents, and those of the prior, of which the last is compared.

    ConfigError: the recipe lacks one of them, or its last stage keeps too few checkpoints to show a convergence.
    """
    given = [stage for stage in config.stages if stage.kind != "prior"]
    trained = [stage for stage in config.stages if stage.kind == "prior"]
    if {stage.kind for stage in given} != {"codec", "latents"} or len(trained) < 2:
        raise ConfigError(
            "the recipe lacks a stage that the pathways need",
            "they need a codec stage, a latents stage, a first prior stage that reads, and a last one that draws",
            "take recipes/ablate_pathway.yaml",
            DOCS,
        )
    last = trained[-1]
    every = last.checkpoint_every or last.steps
    if -(-last.steps // every) > config.keep_checkpoints:
        raise ConfigError(
            f"keep_checkpoints = {config.keep_checkpoints} with {last.steps} steps of {last.name} and a checkpoint"
            f" every {every}",
            "the priors are compared at the steps of their checkpoints, so all of them are kept",
            f"keep_checkpoints={-(-last.steps // every)}",
            DOCS,
        )
    return given, trained


def train_codec(
    loaded: Loaded, arm: Arm, given: Sequence[StageConfig], run_latents: pipeline.Runner, say: Callable[[str], None]
) -> None:
    """The codec whose latents an arm draws, and these latents, unless they are there. One for all seeds."""
    base = loaded.config
    values = base.model_dump(mode="json") | {"stages": [stage.model_dump(mode="json") for stage in given]}
    own = arm.codec_overrides() | {
        "name": f"{base.name}, {arm.codec}",
        "run_dir": str(Path(base.run_dir) / arm.codec),
        "tracking.mlflow": False,
    }
    config = load_values(values, [f"{key}={json.dumps(value)}" for key, value in own.items()]).config
    write_config(config.run_dir, config, dict(loaded.origins) | dict.fromkeys(own, ORIGIN))
    pipeline.run(config, run_latents, say=lambda line: say(f"{arm.codec}: {line}"))


def share_codec(source: Path, cell: Cell) -> None:
    """Let a training find the codec and the latents of `source` where it looks for its own."""
    codec = cell.config.codec_before(cell.stage)
    for place in (Path("weights") / codec, Path("latents")):
        link = cell.folder / place
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(Path(*[".."] * (len(place.parts) + 1)) / source.name / place)


def summary(
    config: Config, arms: Sequence[Arm], cells: Sequence[Cell], measured: Sequence[Measured], captions: Sequence[str]
) -> dict[str, Any]:
    """The content of `ablation.json`, from which the page is made."""
    seeds: dict[str, list[Measured]] = {}
    stages: dict[str, list[Stage]] = {}
    for cell, one in zip(cells, measured, strict=True):
        seeds.setdefault(cell.variant.name, []).append(one)
        stages.setdefault(cell.variant.name, []).append(read_stage(cell))
    steps = measured[0].identity["steps"]
    tables = {
        name: {m.name: {s: np.array([one.values[at(m.name, s)] for one in several]) for s in steps} for m in METRICS}
        for name, several in seeds.items()
    }
    flow = {name: [held_out(stage, FLOW) for stage in several] for name, several in stages.items()}
    stage = cells[0].stage
    return {
        "ablation": "pathway",
        "recipe": config.name,
        "encoder": config.encoder.kind,
        "hidden": config.prior.hidden,
        "layers": config.prior.layers,
        "stages": {name: config.stage(name).steps for name in cells[0].trained},
        "row_positions": stage.row_positions,
        "batch": stage.batch,
        "seeds": sorted({cell.seed for cell in cells}),
        "steps": steps,
        "prompts": {split: len(keys) for split, keys in measured[0].identity["prompts"].items()},
        "captions": list(captions),
        "training_s": round(sum(one.busy_s for several in stages.values() for one in several)),
        "variants": [
            {
                "name": arm.name,
                "label": arm.label,
                "channels": arm.channels,
                "parameters": seeds[arm.name][0].parameters,
                "step_s": float(np.mean([one.busy_s for one in stages[arm.name]])) / stage.steps,
                "figures": {
                    metric: {str(step): over_seeds_and_pictures(values).as_dict() for step, values in table.items()}
                    for metric, table in tables[arm.name].items()
                },
                "flow": mean_curve(flow[arm.name]),
            }
            for arm in arms
        ],
        "claims": [claim.as_dict() for claim in claims_of(arms, tables, flow)],
    }
