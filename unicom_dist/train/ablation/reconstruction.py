"""What every codec of an ablation is measured by: the same held-out pictures, drawn anew with the same noise.

Figures are kept per picture, so that variants can be compared picture by picture, in `measured.json` of the run
directory; the first pictures in `reconstructions.png` beside it, side by side. Both are written once per weights.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.schema import Config
from unicom_dist.data.pairs import spread
from unicom_dist.evaluate.heldout import Pair, read_pairs, to_unit
from unicom_dist.evaluate.image_metrics import psnr, ssim
from unicom_dist.evaluate.reconstruction import Distance, reconstruct
from unicom_dist.evaluate.rows import Better
from unicom_dist.objective.perceptual import Lpips
from unicom_dist.sample.loading import find_parts
from unicom_dist.sample.pictures import PictureCodec
from unicom_dist.sample.pipeline import UniComPipeline
from unicom_dist.train.ablation.cells import DOCS, Cell

FILE, STRIP = "measured.json", "reconstructions.png"


@dataclass(frozen=True)
class Metric:
    """Name and unit of a figure, which direction is better, and the digits behind the point that mean something."""

    name: str
    unit: str
    better: Better
    digits: int = 3


PSNR = Metric("PSNR", "dB", "higher", 2)
SSIM = Metric("SSIM", "", "higher")
LPIPS = Metric("LPIPS", "", "lower")
METRICS = (PSNR, SSIM, LPIPS)


@dataclass(frozen=True)
class Measured:
    """A training's figures: per metric one value per held-out picture, in the order of `keys`."""

    keys: list[str]
    tokens: int  # latents of a picture, and their channels
    channels: int
    parameters: int  # of compressor and decompressor
    values: dict[str, list[float]]
    settings: dict[str, Any]  # by which it was measured

    def mean(self, metric: Metric) -> float:
        """Over the pictures."""
        values = self.values[metric.name]
        return sum(values) / len(values)


@dataclass(frozen=True)
class Judges:
    """The network that judges: LPIPS with the VGG trunk, where training looks through AlexNet."""

    lpips: Distance

    @classmethod
    def load(cls, config: Config, device: torch.device) -> "Judges":
        """From the recipe's `eval` section. ConfigError or DataError: a file is missing."""
        lpips = Lpips.load("vgg", config.eval.lpips_path).eval().to(device)
        return cls(lambda a, b: lpips(a.to(device), b.to(device)).cpu())


def measure(
    cells: Sequence[Cell], config: Config, say: Callable[[str], None], judges: Judges | None = None
) -> tuple[list[Measured], list[Image.Image]]:
    """The figures of every training, and the first of the pictures they were measured on.

    Reads what was measured before and measures the rest. ConfigError, DataError, CheckpointError: something is missing.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs = read_heldout(cells[0], config)
    found = []
    for cell in cells:
        pipeline = UniComPipeline.from_pretrained(cell.folder, device)
        settings = settings_of(config, pipeline.content["fingerprint"])
        measured = read(cell, settings, pairs)
        if measured is None:
            judges = judges or Judges.load(config, device)
            rebuilt = reconstruct(pipeline, pairs, config)
            measured = figures(pipeline, pairs, rebuilt, judges, settings)
            strip(rebuilt[: config.ablation.pictures]).save(cell.folder / STRIP)
            write(cell, measured)
            say(f"{cell.name}: {'  '.join(f'{m.name} {measured.mean(m):.{m.digits}f}' for m in METRICS)}")
        found.append(measured)
    return found, [pair.picture for pair in pairs[: config.ablation.pictures]]


def read_heldout(cell: Cell, config: Config) -> list[Pair]:
    """`eval.images` held-out pairs, those evenly spread come first that are shown. ConfigError: fewer are shown."""
    encoder = json.loads((find_parts(cell.folder).codec / "config.json").read_text(encoding="utf-8"))
    pairs = read_pairs(config, "heldout", encoder["encoder_fingerprint"])
    chosen = [pairs[number] for number in spread(config.eval.images, len(pairs))]
    shown = spread(config.ablation.pictures, len(chosen))
    if len(shown) < config.ablation.pictures:
        raise ConfigError(
            f"ablation.pictures = {config.ablation.pictures}",
            f"{len(chosen)} held-out pictures are measured",
            f"use at most {len(chosen)}, or raise eval.images",
            DOCS,
        )
    return [chosen[n] for n in shown] + [pair for n, pair in enumerate(chosen) if n not in set(shown)]


@torch.no_grad()
def figures(
    pipeline: PictureCodec,
    pairs: Sequence[Pair],
    rebuilt: Sequence[Image.Image],
    judges: Judges,
    settings: Mapping[str, Any],
) -> Measured:
    """All metrics of `rebuilt` against the pairs' pictures."""
    truth, images = to_unit([pair.picture for pair in pairs]), to_unit(rebuilt)
    pieces = zip(torch.split(images, 16), torch.split(truth, 16), strict=True)
    values = {
        PSNR: psnr(images, truth),
        SSIM: ssim(images, truth),
        LPIPS: torch.cat([judges.lpips(a * 2 - 1, b * 2 - 1) for a, b in pieces]),
    }
    (latents,) = pipeline.encode([pairs[0].features])
    codec = pipeline.codec
    parameters = sum(p.numel() for part in (codec.compressor, codec.decompressor) for p in part.parameters())
    return Measured(
        keys=[pair.key for pair in pairs],
        tokens=latents.values.shape[0],
        channels=latents.values.shape[1],
        parameters=parameters,
        values={metric.name: value.double().tolist() for metric, value in values.items()},
        settings=dict(settings),
    )


def strip(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size side by side."""
    width, height = pictures[0].size
    canvas = Image.new("RGB", (width * len(pictures), height))
    for number, picture in enumerate(pictures):
        canvas.paste(picture, (width * number, 0))
    return canvas


def strip_of(cell: Cell, pictures: int) -> list[Image.Image]:
    """The pictures of a training's strip. OSError: there is none."""
    with Image.open(cell.folder / STRIP) as opened:
        whole = opened.convert("RGB")
    width = whole.width // pictures
    return [whole.crop((width * n, 0, width * (n + 1), whole.height)) for n in range(pictures)]


def settings_of(config: Config, fingerprint: str) -> dict[str, Any]:
    """What the figures depend on besides the pictures; `fingerprint` stands for the weights."""
    sample = config.sample
    return {
        "codec": fingerprint,
        "decoder_steps": sample.decoder_steps,
        "solver": sample.solver,
        "seed": sample.seed,
        "pictures": config.ablation.pictures,
    }


def read(cell: Cell, settings: Mapping[str, Any], pairs: Sequence[Pair]) -> Measured | None:
    """What was measured before by the same settings on the same pictures; None if it was not."""
    try:
        measured = Measured(**json.loads((cell.folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    same = measured.settings == dict(settings) and measured.keys == [pair.key for pair in pairs]
    return measured if same and (cell.folder / STRIP).is_file() else None


def write(cell: Cell, measured: Measured) -> None:
    """`measured.json`, whole or not at all."""
    path = cell.folder / FILE
    temporary = path.with_name(f".{FILE}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(measured)) + "\n", encoding="utf-8")
    os.replace(temporary, path)
