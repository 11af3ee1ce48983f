"""The shapes in which pictures are drawn, and which picture is drawn in which.

`square`: one shape, and a picture of another is padded with white. `aspect`: 33 shapes of about the same area, one per
ratio of `models.encoders.crop`; a picture is cut to the nearest ratio, resized to cover its shape and trimmed to it:
nothing is stretched. Trimming takes off what rounding the sides to whole patches leaves over: less than a patch.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from unicom_dist.config.schema import DecoderConfig
from unicom_dist.data.decode import Pixels, to_square
from unicom_dist.data.order import Order
from unicom_dist.models.encoders.crop import BETWEEN, RATIOS, crop_to_ratio, nearest_ratio

Draw = tuple[int, int]  # sample number, visit
GROUP = 8  # most pictures of one shape that are drawn one after the other


class Shape(NamedTuple):
    """A target in pixels."""

    height: int
    width: int


class Buckets:
    """The target shapes of a decoder, numbered; their sides are multiples of what one patch covers."""

    def __init__(self, config: DecoderConfig) -> None:
        self.aspect = config.buckets == "aspect"
        base = config.image_px
        unit = config.patch_px * (config.vae_scale if config.space == "vae" else 1)

        def side(length: float) -> int:
            return max(round(length / unit), 1) * unit

        self.shapes = [Shape(base, base)]
        self._of_ratio = [0] * len(RATIOS)
        if self.aspect:
            shapes = [Shape(side(base / math.sqrt(ratio)), side(base * math.sqrt(ratio))) for ratio in RATIOS]
            self.shapes = list(dict.fromkeys(shapes))  # small bases round neighbouring ratios to one shape
            self._of_ratio = [self.shapes.index(shape) for shape in shapes]

    def of(self, width: int, height: int) -> int:
        """Number of the shape in which a picture of width x height pixels, or of that ratio, is drawn."""
        return self._of_ratio[nearest_ratio(width, height)] if self.aspect else 0

    def of_all(self, sizes: NDArray[np.int32]) -> NDArray[np.int8]:
        """`of` for every (width, height) of sizes [n, 2]; unreadable pictures, of size 0, count as squares."""
        width, height = np.where(sizes.min(1, keepdims=True) > 0, sizes, 1).T
        ratios = np.searchsorted(BETWEEN, width / height, side="right")
        numbers: NDArray[np.int8] = np.array(self._of_ratio, np.int8)[ratios if self.aspect else 0 * ratios]
        return numbers

    def shape_of(self, width: int, height: int) -> Shape:
        """The shape in which a picture of width x height pixels, or of that ratio, is drawn."""
        return self.shapes[self.of(width, height)]

    def target(self, image: Image.Image, shape: Shape | None = None) -> Pixels:
        """[3, H, W] uint8: the RGB `image` in `shape`, by default its own. DataError: too long, see `crop_to_ratio`."""
        if not self.aspect:
            return to_square(image, self.shapes[0].width)
        height, width = shape or self.shape_of(*image.size)
        fitted = ImageOps.fit(crop_to_ratio(image), (width, height), Image.Resampling.LANCZOS)
        return np.ascontiguousarray(np.asarray(fitted).transpose(2, 0, 1))


def group_size(batch: int) -> int:
    """Pictures of one shape per group: the largest divisor of the batch up to GROUP, whatever the number of ranks."""
    return max(size for size in range(1, GROUP + 1) if batch % size == 0)


class BucketOrder:
    """An order of samples rearranged so that every `group` in a row are of one bucket.

    Samples are taken in the order; each waits for `group` - 1 more of its bucket. What waits at the end of an epoch is
    carried into the next: within an epoch nothing is lost or repeated, and at most `group` - 1 per bucket come late.
    The position is what was taken so far and what waits, however far the run has come.
    """

    def __init__(self, order: Order, buckets: NDArray[np.int8], group: int) -> None:
        self._order, self._buckets, self.group = order, buckets, group
        self.taken = 0
        self.waiting: dict[int, list[int]] = {}  # by bucket, the places in the order

    def take(self, count: int) -> list[Draw]:
        """The next `count` draws, a multiple of `group`."""
        draws: list[Draw] = []
        while len(draws) < count:
            number, _ = self._order[self.taken]
            waiting = self.waiting.setdefault(int(self._buckets[number]), [])
            waiting.append(self.taken)
            self.taken += 1
            if len(waiting) == self.group:
                draws += [self._order[place] for place in waiting]
                waiting.clear()
        return draws

    def snapshot(self) -> dict[str, object]:
        """The position as plain JSON values."""
        return {"taken": self.taken, "waiting": {str(b): list(w) for b, w in sorted(self.waiting.items()) if w}}

    def restore(self, taken: int, waiting: dict[str, Sequence[int]]) -> None:
        """Continue from a snapshot."""
        self.taken, self.waiting = taken, {int(bucket): list(places) for bucket, places in waiting.items()}
