"""The points of the codec's ablation, and those that the paper measured.

Channel variants keep all n tokens of an image with d channels each. Spatial ones quarter the tokens and have 4 d
channels, so that an image has as many values, n d. At the ends stand all tokens with all D channels of the encoder, and
a quarter of the tokens with all D.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from unicom_dist.config.schema import AblationConfig

QUARTER = 4  # tokens that become one, and the channels that make up for them
SPATIAL = {"none": "", "pool": "pooled", "resampler": "resampled"}


@dataclass(frozen=True)
class Point:
    """A compressor: its kind (identity: none), what it does to the tokens, and its latent channels."""

    kind: str
    spatial: str
    channels: int

    @property
    def name(self) -> str:
        """Of the folder."""
        fewer = "" if self.spatial == "none" else f"-{self.spatial}"
        return f"{self.kind}{fewer}-{self.channels}"

    @property
    def all_tokens(self) -> bool:
        """Whether tokens are kept."""
        return self.spatial == "none"

    def overrides(self) -> dict[str, Any]:
        """The dotted keys of a recipe. An identity keeps the channels, so nothing widens them again either."""
        values = {"kind": self.kind, "spatial": self.spatial, "channels": self.channels, "bottleneck": "none"}
        if self.kind == "identity":
            values |= {"expanded": 0, "start": "random"}
        return {f"codec.compressor.{key}": value for key, value in values.items()}


@dataclass(frozen=True)
class Published:
    """A row of table 4 of arXiv 2603.10702: 1024 px pictures of ImageNet, encoder width 1152."""

    kind: str
    tokens: int
    channels: int
    rfid: float
    psnr: float
    ssim: float


TABLE_4 = (
    Published("identity", 1024, 1152, 0.40, 23.26, 0.69),
    Published("identity", 256, 1152, 0.72, 20.29, 0.56),
    Published("mlp", 1024, 256, 0.62, 21.73, 0.66),
    Published("mlp", 1024, 64, 0.55, 22.17, 0.66),
    Published("attention", 1024, 64, 0.56, 22.61, 0.69),
)


def published(point: Point) -> Published | None:
    """The row of table 4 that a point corresponds to: kind, share of the tokens, and width or all channels."""
    tokens = 1024 if point.all_tokens else 1024 // QUARTER
    for row in TABLE_4:
        width = row.channels == point.channels or point.kind == "identity"
        if row.kind == point.kind and row.tokens == tokens and width:
            return row
    return None


def points_of(ablation: AblationConfig, channels: int) -> dict[str, Point]:
    """The grid by name for an encoder of so many channels, the ends first."""
    points = [Point("identity", spatial, channels) for spatial in ("none", *ablation.spatial)]
    for kind in ablation.kinds:
        points += [Point(kind, "none", width) for width in ablation.widths]
        points += [Point(kind, spatial, QUARTER * width) for spatial in ablation.spatial for width in ablation.widths]
    return {point.name: point for point in points}


def equal_scalars(points: Mapping[str, Point]) -> Iterator[tuple[Point, Point]]:
    """Pairs of points of one kind with as many values per image: all tokens, a quarter of them."""
    for point in points.values():
        for other in points.values():
            same = (point.kind, QUARTER * point.channels) == (other.kind, other.channels)
            if point.kind != "identity" and point.all_tokens and not other.all_tokens and same:
                yield point, other
