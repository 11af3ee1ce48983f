"""The `reconstruction` suite: how faithful a codec's pictures are, over a whole set, in figures others publish too.

rFID and KID, PSNR, SSIM, LPIPS and the cosine of encoder features, beside the mean picture; figures per size, the worst
pictures, and the protocol in words. Of a model and its held-out set, or of two folders of pictures.
Writes `suites.reconstruction` of `eval.json` and `samples/eval/reconstruction-{suite,worst}.png`.
"""

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unicom_dist.config.errors import DataError
from unicom_dist.config.load import load_recipe
from unicom_dist.config.schema import Config, EvalConfig
from unicom_dist.config.storage import make_folder
from unicom_dist.data.pairs import spread
from unicom_dist.evaluate.fid_features import NETWORK
from unicom_dist.evaluate.parts import Build, Execute, in_this_process, measure_parts
from unicom_dist.evaluate.picture_pairs import CodecPairs, FolderPairs, PicturePair, PictureSource, with_codec_of
from unicom_dist.evaluate.result import recipe_of, write_result
from unicom_dist.evaluate.rows import Row
from unicom_dist.evaluate.ruler import METRICS, Ruler, to_bytes
from unicom_dist.evaluate.set_scores import Baseline, SetScores
from unicom_dist.sample.grid import picture_grid

log = logging.getLogger(__name__)

SUITE = "reconstruction"
SHOWN, WORST = 24, 16  # pictures of a sheet
MEAN_OF, MEAN_ON = 256, 32  # the baseline: mean of so many originals, measured on so many of them
COPIED = 4  # originals measured against themselves


def run(
    model: str | Path,
    recipe: str | Path = "",
    out: str | Path = "",
    limit: int = 0,
    execute: Execute = in_this_process,
    load_ruler: Callable[[Config | None], Ruler] | None = None,
) -> list[Row]:
    """Measure the codec of a run directory or model folder on `limit` held-out pictures (0 = all). Returns the rows.

    recipe: where data and judging networks are; "" = that of the run. out: where results go; "" = `model`.
    execute: carries out the parts, for example on several workers. load_ruler: other judging networks.
    ConfigError, DataError, CheckpointError: something is missing; PreflightError: results cannot be written.
    """
    config = with_codec_of(model, recipe_of(Path(model), recipe))
    build = Build(partial(CodecPairs, model, config, limit), partial(load_ruler or ruler_of, config))
    return _run(build, config, Path(out or model), execute)


def run_folders(
    originals: str | Path,
    reconstructions: str | Path,
    recipe: str | Path = "",
    out: str | Path = "eval",
    limit: int = 0,
    execute: Execute = in_this_process,
    load_ruler: Callable[[Config | None], Ruler] | None = None,
) -> list[Row]:
    """Measure the pictures of one folder against those of the same names in another. Returns the rows.

    recipe: names the judging networks and the encoder of the feature cosine; "" = networks in assets/, no cosine.
    Other arguments and errors as in `run`.
    """
    config = load_recipe(recipe).config if recipe else None
    build = Build(partial(FolderPairs, originals, reconstructions, limit), partial(load_ruler or ruler_of, config))
    return _run(build, config, Path(out), execute)


def ruler_of(config: Config | None) -> Ruler:
    """The judging networks a recipe names; without one those in assets/, and no encoder."""
    return Ruler.load(config.eval, config.encoder) if config else Ruler.load(EvalConfig(), None)


def _run(build: Build, config: Config | None, target: Path, execute: Execute) -> list[Row]:
    began = time.perf_counter()
    source, ruler = build.source, build.ruler  # what is missing is said before anything is measured
    sheets, parts = target / "samples" / "eval", target / f".eval-{SUITE}"
    make_folder(sheets)
    settings = config.model_dump(mode="json", include={"eval", "encoder"}) if config else {}
    scores = SetScores(len(source.keys))
    for part in measure_parts(parts, len(source.keys), {"source": source.identity, **settings}, build, execute):
        scores.add(part)
    for reason in scores.left_out:
        log.warning("left out of the evaluation: %s", reason)
    if not scores.keys:
        raise DataError(f"none of {len(source.keys)} pictures could be measured", "", "run `unicom data check`")
    protocol = ruler.fid.protocol if ruler.fid else None
    rows = scores.rows(source.name, protocol, mean_picture_scores(source, ruler))
    worst = scores.worst(WORST)
    _save_sheets(source, scores, worst, sheets)
    result = {
        "suite": SUITE,
        "rows": [row.as_dict() for row in rows],
        "protocol": _protocol(source, ruler),
        "sizes": scores.by_size(),
        "copy": _copy_scores(source, ruler),
        "worst": [scores.of(number) for number in worst],
        "left_out": scores.left_out,
        "seconds": round(time.perf_counter() - began, 1),
    }
    path = write_result(target, result)
    shutil.rmtree(parts, ignore_errors=True)
    log.info("%s and %s written after %.0f s", path, sheets, result["seconds"])
    return rows


def mean_picture_scores(source: PictureSource, ruler: Ruler) -> Baseline:
    """What the mean of the originals scores on them: of those of the most frequent size."""
    originals = source.originals(spread(MEAN_OF, len(source.keys)))
    sizes = [picture.size for picture in originals]
    common = [picture for picture in originals if picture.size == max(set(sizes), key=sizes.count)]
    total = np.sum([np.asarray(picture, np.float64) for picture in common], 0)
    flat = Image.fromarray(np.round(total / len(common)).astype(np.uint8))
    chosen = [common[number] for number in spread(MEAN_ON, len(common))]
    measured = replace(ruler, fid=None).measure([PicturePair("", picture, flat) for picture in chosen])
    scores = {name: float(values.mean()) for name, values in measured.scores.items()}
    features = None if ruler.fid is None else ruler.fid(to_bytes([flat]))[0].numpy()
    return Baseline("mean image", scores, features)


def _copy_scores(source: PictureSource, ruler: Ruler) -> dict[str, float]:
    """What a copy scores: the best there is, and a look at the ruler itself."""
    originals = source.originals(spread(COPIED, len(source.keys)))
    measured = replace(ruler, fid=None).measure([PicturePair("", picture, picture) for picture in originals])
    return {name: float(values.mean()) for name, values in measured.scores.items() if np.isfinite(values).all()}


def _protocol(source: PictureSource, ruler: Ruler) -> dict[str, str]:
    """What has to stand beside the figures wherever they are quoted."""
    words = dict(source.facts)
    if ruler.fid is not None:
        words |= {"FID network": NETWORK, "FID input": ruler.fid.protocol.text}
    if ruler.encoder is not None:
        words["feature cosine"] = ruler.encoder.describe()
    return words | {"SSIM": METRICS["ssim"].note, "LPIPS": METRICS["lpips"].note}


def _save_sheets(source: PictureSource, scores: SetScores, worst: list[int], folder: Path) -> None:
    place = {key: number for number, key in enumerate(source.keys)}
    typical = [place[scores.keys[number]] for number in spread(SHOWN, len(scores.keys))]
    for name, numbers, title in (
        ("suite", typical, "original, reconstruction"),
        ("worst", [place[scores.keys[number]] for number in worst], "the worst: original, reconstruction"),
    ):
        pairs, _ = source.pairs(numbers)
        figures = {scores.keys[number]: scores.of(number) for number in worst} if name == "worst" else {}
        pictures = [picture for pair in pairs for picture in (pair.original, pair.rebuilt)]
        labels = [text for pair in pairs for text in (pair.key, _figures(figures.get(pair.key)))]
        grid = picture_grid(pictures, labels, 8, 128, title=f"{source.name}: {title}")
        grid.save(folder / f"reconstruction-{name}.png")


def _figures(of_picture: dict[str, Any] | None) -> str:
    """PSNR and LPIPS for a label."""
    if of_picture is None:
        return "reconstruction"
    lpips = f", LPIPS {of_picture['lpips']:.2f}" if "lpips" in of_picture else ""
    return f"{of_picture['psnr']:.1f} dB{lpips}"
