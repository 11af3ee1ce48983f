"""What every codec of an ablation is measured by: the reconstruction suite's figures on the same held-out pictures.

Some of what was rebuilt is kept in `reconstructions.png` of the run directory, side by side.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from unicom_dist.config.errors import DataError
from unicom_dist.config.schema import Config
from unicom_dist.data.pairs import spread
from unicom_dist.evaluate import ruler as rulers
from unicom_dist.evaluate.frechet import FeatureSums, frechet_distance
from unicom_dist.evaluate.picture_pairs import CodecPairs, PicturePair, with_codec_of
from unicom_dist.evaluate.ruler import Ruler
from unicom_dist.train.ablation.cells import DOCS, Cell
from unicom_dist.train.ablation.measured import Measured, Metric, read, strip, write

STRIP = "reconstructions.png"
TOGETHER = 32  # pictures drawn and judged at a time


PSNR = Metric("PSNR", "dB", rulers.METRICS["psnr"].better, 2)
SSIM = Metric("SSIM", "", rulers.METRICS["ssim"].better)
LPIPS = Metric("LPIPS", "", rulers.METRICS["lpips"].better)
COSINE = Metric("feature cosine", "", rulers.METRICS["cosine"].better)
RFID = Metric("rFID", "", "lower", 2)
OF_PAIRS = {"psnr": PSNR, "ssim": SSIM, "lpips": LPIPS, "cosine": COSINE}
METRICS = (*OF_PAIRS.values(), RFID)


def measure(
    cells: Sequence[Cell], config: Config, say: Callable[[str], None], ruler: Ruler | None = None
) -> tuple[list[Measured], list[Image.Image]]:
    """The figures of every training, and the originals of the pictures that are shown.

    Reads what was measured before and measures the rest. ConfigError, DataError, CheckpointError: something is missing.
    """
    found: list[Measured] = []
    originals: list[Image.Image] = []
    for cell in cells:
        source = CodecPairs(cell.folder, with_codec_of(cell.folder, config), config.eval.images)
        shown = spread(config.ablation.pictures, len(source.keys))
        originals = originals or [picture.convert("RGB") for picture in source.originals(shown)]
        judged = config.eval.model_dump(mode="json", include={"fid_path", "fid_protocol", "lpips_path"})
        drawn = config.sample.model_dump(mode="json", include={"decoder_steps", "decoder_guidance", "solver", "seed"})
        identity = {**source.identity, **judged, "sample": drawn, "shown": len(shown)}
        measured = read(cell.folder, identity, STRIP)
        if measured is None:
            ruler = ruler or Ruler.load(config.eval, config.encoder)
            measured, rebuilt = figures(source, ruler, identity)
            strip([rebuilt[number] for number in spread(len(shown), len(rebuilt))]).save(cell.folder / STRIP)
            write(cell.folder, measured)
            told = [metric for metric in METRICS if metric.name in measured.values]
            say(f"{cell.name}: {'  '.join(f'{m.name} {measured.mean(m.name):.{m.digits}f}' for m in told)}")
        found.append(measured)
    return found, originals


def figures(source: CodecPairs, ruler: Ruler, identity: dict[str, Any]) -> tuple[Measured, list[Image.Image]]:
    """All figures of a codec's held-out pictures, and what it made of them. DataError: no picture can be read."""
    pairs: list[PicturePair] = []
    values: dict[str, list[float]] = {}
    sums: tuple[FeatureSums, FeatureSums] | None = None
    for first in range(0, len(source.keys), TOGETHER):
        some, _ = source.pairs(range(first, min(first + TOGETHER, len(source.keys))))
        if not some:
            continue
        pairs += some
        measured = ruler.measure(some)
        for key, scores in measured.scores.items():
            values.setdefault(OF_PAIRS[key].name, []).extend(scores.tolist())
        if measured.originals is not None and measured.rebuilt is not None:
            part = FeatureSums.of(measured.originals), FeatureSums.of(measured.rebuilt)
            sums = part if sums is None else (sums[0] + part[0], sums[1] + part[1])
    if not pairs:
        raise DataError(
            "no held-out picture can be read", "there is nothing to measure", "run `unicom data check`", DOCS
        )
    values = {name: scores for name, scores in values.items() if np.isfinite(scores).all()}  # all are large enough
    if sums is not None:
        values[RFID.name] = [frechet_distance(*sums)]
    codec = source.codec.codec
    parameters = sum(p.numel() for part in (codec.compressor, codec.decompressor) for p in part.parameters())
    keys = [pair.key for pair in pairs]
    return Measured(keys, parameters, values, identity), [pair.rebuilt for pair in pairs]
