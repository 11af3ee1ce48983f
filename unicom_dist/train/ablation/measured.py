"""Figures of a training, kept so that variants can be compared picture by picture, and some of its pictures.

`measured.json` in the run directory of the training, and a strip of pictures side by side. Both are written once per
weights and settings.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from unicom_dist.evaluate.rows import Better

FILE = "measured.json"


@dataclass(frozen=True)
class Metric:
    """Name and unit of a figure, which direction is better, and the digits behind the point that mean something."""

    name: str
    unit: str
    better: Better
    digits: int = 3


@dataclass(frozen=True)
class Measured:
    """A training's figures: by the metric's name a value per picture, in the order of `keys`; one in all for rFID."""

    keys: list[str]
    parameters: int  # of what the variants differ in
    values: dict[str, list[float]]
    identity: dict[str, Any]  # what they depend on

    def mean(self, name: str) -> float:
        """Of the figure `name`, over the pictures."""
        values = self.values[name]
        return sum(values) / len(values)

    def means(self) -> dict[str, float]:
        """Of all figures."""
        return {name: self.mean(name) for name in self.values}


def strip(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side, each on a square as large as the longest side of all."""
    side = max(max(picture.size) for picture in pictures)
    canvas = Image.new("RGB", (side * len(pictures), side), (255, 255, 255))
    for number, picture in enumerate(pictures):
        canvas.paste(picture, (side * number + (side - picture.width) // 2, (side - picture.height) // 2))
    return canvas


def strip_of(path: Path) -> list[Image.Image]:
    """The pictures of a strip. OSError: there is none."""
    with Image.open(path) as opened:
        whole = opened.convert("RGB")
    side = whole.height
    return [whole.crop((left, 0, left + side, side)) for left in range(0, whole.width, side)]


def read(folder: Path, identity: dict[str, Any], strip_name: str) -> Measured | None:
    """What was measured before of the same, with its strip; None if it was not."""
    try:
        measured = Measured(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return measured if measured.identity == identity and (folder / strip_name).is_file() else None


def write(folder: Path, measured: Measured) -> None:
    """`measured.json`, whole or not at all."""
    path = folder / FILE
    temporary = path.with_name(f".{FILE}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(measured)) + "\n", encoding="utf-8")
    os.replace(temporary, path)
