"""`unicom ablate codec`: the points of `codec_grid`, trained and measured alike, and the page about them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.load import Loaded
from unicom_dist.config.schema import Config, StageConfig
from unicom_dist.data.pairs import feature_channels, grid_of, open_set
from unicom_dist.evaluate.intervals import over_seeds_and_pictures
from unicom_dist.evaluate.ruler import Ruler
from unicom_dist.train.ablation import codec_page
from unicom_dist.train.ablation.cells import DOCS, Cell, Variant, make_cells, train
from unicom_dist.train.ablation.codec_claims import claims_of
from unicom_dist.train.ablation.codec_grid import Point, points_of
from unicom_dist.train.ablation.frame import ablation, publish, strips_of
from unicom_dist.train.ablation.journal import by_variant, held_out, mean_curve, read_stage, record
from unicom_dist.train.ablation.measured import Measured
from unicom_dist.train.ablation.reconstruction import METRICS, STRIP, measure

FLOW, PERCEPTUAL = "loss/flow", "loss/perceptual"  # held out, over the steps of a training


def run(loaded: Loaded, say: Callable[[str], None], ruler: Ruler | None = None) -> Path:
    """Train what is not trained, measure what is not measured, write the result. Returns the path of the page.

    Everything is in `run_dir`: a folder per training, `ablation.json`, `ablation.html` and the sheet of pictures. `say`
    receives a line for the user per event; `ruler`: other judging networks than the recipe's. Raises whatever ended
    it, with the status written.
    """
    config = loaded.config
    stage = codec_stage(config)
    points = points_of(config.ablation, feature_channels(open_set(config, "train"), config.encoder.kind))
    cells = make_cells(loaded, [Variant(name, point.overrides()) for name, point in points.items()], [stage])
    with ablation(loaded, stage) as folder:
        train(cells, folder, say)
        measured, originals = measure(cells, config, say, ruler)
        record(folder, cells, {cell.name: one.means() for cell, one in zip(cells, measured, strict=True)})
        result = summary(config, stage, points, tokens_of(config, points), cells, measured)
        sheet = codec_page.sheet(result, originals, strips_of(cells, STRIP))
        return publish(folder, result, sheet, codec_page.render)


def codec_stage(config: Config) -> StageConfig:
    """The recipe's first codec stage. ConfigError without one."""
    for stage in config.stages:
        if stage.kind == "codec":
            return stage
    raise ConfigError(
        "the recipe has no codec stage", "it says how a codec is trained", "take recipes/ablate_codec.yaml", DOCS
    )


def tokens_of(config: Config, points: Mapping[str, Point]) -> dict[str, int]:
    """Latents per picture by variant: of the first held-out one, where they differ with its aspect ratio."""
    sample, kind = open_set(config, "heldout")[0], config.encoder.kind
    grid = grid_of(sample, kind, "features.npy")
    compressor = config.codec.compressor
    grids = {name: compressor.model_copy(update={"spatial": p.spatial}).latent_grid(grid) for name, p in points.items()}
    return {name: rows * columns for name, (rows, columns) in grids.items()}


def summary(
    config: Config,
    stage: StageConfig,
    points: Mapping[str, Point],
    tokens: Mapping[str, int],
    cells: Sequence[Cell],
    measured: Sequence[Measured],
) -> dict[str, Any]:
    """The content of `ablation.json`, from which the page is made."""
    seeds, stages = by_variant(cells, measured), by_variant(cells, map(read_stage, cells))
    metrics = [metric.name for metric in METRICS if all(metric.name in one.values for one in measured)]
    tables = {name: {metric: table_of(several, metric) for metric in metrics} for name, several in seeds.items()}
    curves = {
        key: {name: [held_out(s, key) for s in several] for name, several in stages.items()}
        for key in (FLOW, PERCEPTUAL)
    }
    whole = next(iter(points))
    claims = claims_of(points, tokens, tables, curves[FLOW])
    return {
        "ablation": "codec",
        "recipe": config.name,
        "encoder": config.encoder.kind,
        "steps": stage.steps,
        "batch": stage.batch,
        "image_px": config.codec.decoder.image_px,
        "concat_tokens": config.codec.decoder.concat_tokens,
        "seeds": sorted({cell.seed for cell in cells}),
        "pictures": len(measured[0].keys),
        "training_s": round(sum(one.busy_s for several in stages.values() for one in several)),
        "variants": [
            {
                "name": name,
                "kind": point.kind,
                "spatial": point.spatial,
                "tokens": tokens[name],
                "channels": point.channels,
                "parameters": seeds[name][0].parameters,
                "figures": {
                    metric: over_seeds_and_pictures(values).as_dict() for metric, values in tables[name].items()
                },
                "against_whole": {
                    metric: over_seeds_and_pictures(values - tables[whole][metric]).as_dict()
                    for metric, values in tables[name].items()
                },
                "curves": {key: mean_curve(found[name]) for key, found in curves.items()},
            }
            for name, point in points.items()
        ],
        "seed_std": {metric: seed_std([tables[name][metric] for name in points]) for metric in metrics},
        "claims": [claim.as_dict() for claim in claims],
    }


def table_of(several: Sequence[Measured], metric: str) -> NDArray[np.float64]:
    """[seeds, pictures], or [seeds, 1] for a figure of all pictures together."""
    return np.array([one.values[metric] for one in several])


def seed_std(tables: Sequence[NDArray[np.float64]]) -> float | None:
    """Standard deviation between seeds of the mean over pictures, pooled over variants [S, P]; None for one seed."""
    if len(tables[0]) < 2:
        return None
    return float(np.mean([values.mean(1).var(ddof=1) for values in tables]) ** 0.5)
