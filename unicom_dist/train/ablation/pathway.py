"""`unicom ablate pathway`: the priors of `pathway_grid`, trained and measured alike, and the page about them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.explain import write_config
from unicom_dist.config.load import Loaded
from unicom_dist.config.schema import Config, StageConfig
from unicom_dist.data.pairs import feature_channels, open_set
from unicom_dist.evaluate.intervals import over_seeds_and_pictures
from unicom_dist.evaluate.judge import Embed
from unicom_dist.train import pipeline
from unicom_dist.train.ablation import pathway_page
from unicom_dist.train.ablation.cells import DOCS, Cell, Variant, check_settings, derived, make_cells, train
from unicom_dist.train.ablation.drawing import METRICS, STRIP, at, measure
from unicom_dist.train.ablation.frame import ablation, publish, strips_of
from unicom_dist.train.ablation.journal import by_variant, held_out, mean_curve, read_stage, record
from unicom_dist.train.ablation.measured import Measured
from unicom_dist.train.ablation.pathway_claims import claims_of
from unicom_dist.train.ablation.pathway_grid import Arm, arms_of

FLOW = "loss/flow"


def run(loaded: Loaded, run_latents: pipeline.Runner, say: Callable[[str], None], embed: Embed | None = None) -> Path:
    """Train what is not trained, measure what is not measured, write the result. Returns the path of the page.

    Everything is in `run_dir`: a folder per codec and per training, `ablation.json`, `ablation.html` and the sheet of
    pictures. `run_latents` as for `train.pipeline.run`; `say` receives a line for the user per event; `embed`: another
    judge than the recipe's. Raises whatever ended it, with the status written.
    """
    config = loaded.config
    given, trained = stages_of(config)
    arms = arms_of(config, feature_channels(open_set(config, "train"), config.encoder.kind))
    codecs = {arm.codec: derived(loaded, given, arm.codec, arm.codec, arm.codec_overrides()) for arm in arms}
    variants = [Variant(arm.name, arm.overrides(config, trained[-1].name)) for arm in arms]
    cells = make_cells(loaded, variants, trained, given)
    with ablation(loaded, trained[-1]) as folder:
        for name, codec in codecs.items():
            check_settings(codec.config)
            write_config(codec.config.run_dir, codec.config, codec.origins)
            pipeline.run(codec.config, run_latents, say=lambda line, name=name: say(f"{name}: {line}"))  # type: ignore[misc]
        of_arm = {arm.name: folder / arm.codec for arm in arms}
        for cell in cells:
            share_codec(of_arm[cell.variant.name], cell)
        train(cells, folder, say)
        measured, originals = measure(cells, config, say, embed)
        record(folder, cells, {cell.name: one.means() for cell, one in zip(cells, measured, strict=True)})
        result = summary(config, arms, cells, measured, [caption for caption, _ in originals])
        sheet = pathway_page.sheet(result, [picture for _, picture in originals], strips_of(cells, STRIP))
        return publish(folder, result, sheet, pathway_page.render)


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
    needed = -(-last.steps // every)
    if needed > config.keep_checkpoints:
        raise ConfigError(
            f"keep_checkpoints = {config.keep_checkpoints} with {last.steps} steps of {last.name} and a checkpoint"
            f" every {every}",
            "the priors are compared at the steps of their checkpoints, so all of them are kept",
            f"keep_checkpoints={needed}",
            DOCS,
        )
    return given, trained


def share_codec(source: Path, cell: Cell) -> None:
    """Let a training find the codec and the latents of `source` where it looks for its own."""
    codec = cell.config.codec_before(cell.stage)
    for place in (Path("weights") / codec, Path("latents")):
        link = cell.folder / place
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(source / place, link.parent))


def summary(
    config: Config, arms: Sequence[Arm], cells: Sequence[Cell], measured: Sequence[Measured], captions: Sequence[str]
) -> dict[str, Any]:
    """The content of `ablation.json`, from which the page is made."""
    seeds, stages = by_variant(cells, measured), by_variant(cells, map(read_stage, cells))
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
