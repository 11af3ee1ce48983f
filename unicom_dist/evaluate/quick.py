"""The `quick` suite: reconstructions, losses, pictures for prompts and edits, captions, on held-out data, in a minute.

Each figure stands beside the untrained model and a trivial baseline. Writes `eval.json` and `samples/eval/*.png` into
the run directory: {"suite", "rows", "flow_loss": {stage: {t: loss}}, "captions": [{key, truth, generated}], "seconds"}.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from unicom_dist.config.schema import Config
from unicom_dist.config.storage import make_folder
from unicom_dist.data.pairs import spread
from unicom_dist.evaluate.edits import draw_edits, edit_grid, edit_rows, read_edits
from unicom_dist.evaluate.generation import (
    Drawn,
    Gallery,
    draw,
    in_one_step,
    prompt_rows,
    resnet_judge,
    untrained_prior,
)
from unicom_dist.evaluate.heldout import Pair, heldout_latents, mean_picture, read_pairs
from unicom_dist.evaluate.judge import Embed
from unicom_dist.evaluate.losses import caption_row, edit_flow_row, flow_rows
from unicom_dist.evaluate.reconstruction import Distance, reconstruct, reconstruction_rows, untrained_codec
from unicom_dist.evaluate.result import EVAL_FILE, measured, recipe_of, rows_before, write_result
from unicom_dist.evaluate.rows import Row
from unicom_dist.objective.perceptual import Lpips
from unicom_dist.parallel.precision import training_dtype
from unicom_dist.sample.grid import picture_grid
from unicom_dist.sample.loading import LoadedPrior, check_pair, find_parts, load_prior, stage_names
from unicom_dist.sample.pipeline import UniComPipeline

log = logging.getLogger(__name__)

SHOWN = 24  # pictures of a grid
CAPTIONS = 16  # held-out pictures described in eval.json


@dataclass(frozen=True)
class Networks:
    """The networks that judge: features of pictures, perceptual distance of pictures."""

    embed: Embed
    lpips: Distance

    @classmethod
    def load(cls, config: Config, device: torch.device) -> "Networks":
        """ResNet50 and LPIPS-VGG from the recipe's `eval` section. ConfigError or DataError if a file is missing."""
        embed = resnet_judge(config.eval.judge_path, config.codec.decoder.image_px, device)
        lpips = Lpips.load("vgg", config.eval.lpips_path).eval().to(device)
        return cls(embed, lambda a, b: lpips(a.to(device), b.to(device)).cpu())


def run(
    checkpoint: str | Path,
    networks: Networks | None = None,
    recipe: str | Path = "",
    out: str | Path = "",
    skip_done: bool = False,
) -> list[Row]:
    """Measure the model in a run directory or model folder. Returns the rows of `eval.json`, written to `out`.

    recipe: where the pairs and the judging networks are; "" = that of the run. out: "" = `checkpoint`.
    skip_done: keep the figures that `out` holds if they are of these weights and settings.
    Without a finished prior only the codec is measured. ConfigError, DataError, CheckpointError: something is missing;
    PreflightError: the folder cannot be written.
    """
    began = time.perf_counter()
    folder, target = Path(checkpoint), Path(out or checkpoint)
    config = recipe_of(folder, recipe)
    identity = measured(folder, config)
    if skip_done and (rows := rows_before(target, identity)) is not None:
        log.info("%s is of these weights and settings, skipped", target / EVAL_FILE)
        return rows
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = training_dtype(config.stages[-1].precision, device)
    pipeline = UniComPipeline.from_pretrained(folder, dtype=dtype)
    config = config.model_copy(update={"encoder": pipeline.encoder_config, "codec": pipeline.codec.config})
    networks = networks or Networks.load(config, pipeline.device)
    grids = target / "samples" / "eval"
    make_folder(grids)
    result: dict[str, Any] = {"suite": "quick", "measured": identity}
    with _timed("pictures read"):
        encoder = pipeline.content["encoder_fingerprint"]
        train, heldout = read_pairs(config, "train", encoder), read_pairs(config, "heldout", encoder)
        mean = mean_picture(train)
    rows = _codec(config, pipeline, networks, heldout, mean, grids)
    stages = stage_names(folder)
    if stages:
        with heldout_latents(config, folder, pipeline.content["fingerprint"], pipeline.device) as with_latents:
            rows += _prior_losses(with_latents, pipeline, folder, stages, result)
        rows += _prompts(config, pipeline, networks, train, heldout, mean, grids)
        rows += _edits(config, pipeline, networks, encoder, grids)
        with _timed("held-out pictures described"):
            result["captions"] = _captions(pipeline, heldout)
    result["rows"] = [row.as_dict() for row in rows]
    result["seconds"] = round(time.perf_counter() - began, 1)
    write_result(target, result)
    log.info("%s and %s written after %.0f s", target / EVAL_FILE, grids, result["seconds"])
    return rows


def _codec(
    config: Config, pipeline: UniComPipeline, networks: Networks, heldout: list[Pair], mean: Image.Image, grids: Path
) -> list[Row]:
    chosen = _some(heldout, config.eval.images)
    with _timed(f"{len(chosen)} held-out pictures reconstructed"):
        originals = [pair.picture for pair in chosen]
        rebuilt = reconstruct(pipeline, chosen, config)
        untrained = reconstruct(untrained_codec(pipeline, config.seed), chosen, config)
        rows = reconstruction_rows(originals, rebuilt, untrained, mean, networks.lpips)
        both = [picture for pair in zip(originals, rebuilt, strict=True) for picture in pair]
        labels = [text for pair in chosen for text in (pair.caption, "reconstruction")]
        grid = picture_grid(both[: 2 * SHOWN], labels[: 2 * SHOWN], 8, 128, title="held out: original, reconstruction")
        grid.save(grids / "reconstructions.png")
    return rows


def _prior_losses(
    config: Config, pipeline: UniComPipeline, folder: Path, stages: list[str], result: dict[str, Any]
) -> list[Row]:
    def trained() -> Iterator[tuple[str, LoadedPrior]]:
        for stage in stages:
            if stage == stages[-1]:
                yield stage, pipeline.prior
                continue
            path = find_parts(folder, stage).prior
            assert path is not None
            prior = load_prior(path, pipeline.device, pipeline.codec.dtype)
            check_pair(pipeline.content, prior.content, folder)
            yield stage, prior

    with _timed(f"losses of {len(stages)} stages"):
        untrained = untrained_prior(pipeline, config.seed).prior.model
        rows, result["flow_loss"] = flow_rows(config, trained(), untrained)
        edits = edit_flow_row(config, stages[-1], pipeline.prior, untrained)
        return [*rows, *([edits] if edits else []), caption_row(config, stages[-1], pipeline.prior, untrained)]


def _prompts(
    config: Config,
    pipeline: UniComPipeline,
    networks: Networks,
    train: list[Pair],
    heldout: list[Pair],
    mean: Image.Image,
    grids: Path,
) -> list[Row]:
    rows: list[Row] = []
    with _timed(f"{len(train) + len(heldout)} real pictures shown to the judge"):
        gallery = Gallery(networks.embed, [*train, *heldout])
    fresh = untrained_prior(pipeline, config.seed)
    for split, pairs in (("heldout prompts", heldout), ("train prompts", train)):
        chosen = _some(pairs, config.eval.prompts)
        captions = [pair.caption for pair in chosen]
        with _timed(f"{len(chosen)} {split} drawn"):
            drawn = gallery.judge(draw(pipeline, chosen, config), captions)
            untrained = gallery.judge(draw(fresh, chosen, in_one_step(config)), captions)
            rebuilt = gallery.judge(reconstruct(pipeline, chosen, config), captions)
            rows += prompt_rows(gallery, split, drawn, untrained, mean, rebuilt)
            _save_prompts(drawn, chosen, grids / f"{split.replace(' ', '-')}.png", len(gallery.prototypes.captions))
    return rows


def _save_prompts(drawn: Drawn, pairs: list[Pair], path: Path, prototypes: int) -> None:
    """Each drawn picture beside the real one of its caption."""
    pictures, labels = [], []
    for pair, picture, rank in list(zip(pairs, drawn.pictures, drawn.ranks.tolist(), strict=True))[:SHOWN]:
        pictures += [picture, pair.picture]
        labels += [f"{pair.caption} (#{rank + 1})", "real"]
    title = f"drawn, real; in brackets: place of the real picture among {prototypes}, by likeness to what was drawn"
    picture_grid(pictures, labels, 8, 128, title=title).save(path)


def _edits(config: Config, pipeline: UniComPipeline, networks: Networks, encoder: str, grids: Path) -> list[Row]:
    edits = read_edits(config, encoder, config.eval.prompts)
    if not edits:
        return []
    with _timed(f"{len(edits)} edits of held-out pictures drawn"):
        drawn = draw_edits(pipeline, edits, config)
        untrained = draw_edits(untrained_prior(pipeline, config.seed), edits, in_one_step(config))
        edit_grid(edits[:SHOWN], drawn[:SHOWN]).save(grids / "edits.png")
        return edit_rows(edits, drawn, untrained, pipeline, config, networks.lpips)


def _captions(pipeline: UniComPipeline, heldout: list[Pair]) -> list[dict[str, str]]:
    chosen = _some(heldout, CAPTIONS)
    texts = pipeline.captions([pair.features for pair in chosen])
    return [
        {"key": pair.key, "truth": pair.caption, "generated": text} for pair, text in zip(chosen, texts, strict=True)
    ]


def _some(pairs: list[Pair], count: int) -> list[Pair]:
    return [pairs[number] for number in spread(count, len(pairs))]


@contextmanager
def _timed(what: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    log.info("%s: %.1f s", what, time.perf_counter() - began)
