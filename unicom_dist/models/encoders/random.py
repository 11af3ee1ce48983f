"""A randomly initialised encoder, for tests only: its features depend on the picture and mean nothing.

The picture is reduced to 16 x 16 pixels and each 4 x 4 of them mapped linearly to 24 channels: 16 tokens, no weights on
disk. With `crop: bucket` it is cut first and keeps its ratio, in at most 16 tokens.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unicom_dist.config.schema import EncoderConfig
from unicom_dist.models.encoders.base import EncodedImage, Prepared, fingerprint, square_view
from unicom_dist.models.encoders.crop import crop_to_ratio
from unicom_dist.models.encoders.siglip2 import naflex_grid

GRID = 4
SUBPIXELS = 4
CHANNELS = 24


class RandomEncoder:
    """The `random` encoder: a fixed linear map of coarse patches."""

    channels = CHANNELS
    max_tokens = GRID * GRID

    def __init__(self, config: EncoderConfig) -> None:
        self.fingerprint = random_fingerprint(config)
        self._crop = config.crop == "bucket"
        self._map = np.random.default_rng(0).standard_normal((SUBPIXELS**2 * 3, CHANNELS)).astype(np.float32) / 4

    def describe(self) -> str:
        return f"random linear map, {GRID}x{GRID} tokens of {CHANNELS} channels (for tests, no semantics)"

    def preprocess(self, image: Image.Image) -> Prepared:
        if not self._crop:
            return {"pixels": np.asarray(square_view(image, GRID * SUBPIXELS))}
        image = crop_to_ratio(image.convert("RGB"))
        rows, columns = naflex_grid(image.height, image.width, SUBPIXELS, self.max_tokens)
        size = (columns * SUBPIXELS, rows * SUBPIXELS)
        return {"pixels": np.asarray(image.resize(size, Image.Resampling.BILINEAR))}

    def encode(self, batch: Sequence[Prepared]) -> list[EncodedImage]:
        return [self._encode(item["pixels"].astype(np.float32) / 127.5 - 1) for item in batch]

    def _encode(self, pixels: NDArray[np.float32]) -> EncodedImage:
        rows, columns = pixels.shape[0] // SUBPIXELS, pixels.shape[1] // SUBPIXELS
        patches = pixels.reshape(rows, SUBPIXELS, columns, SUBPIXELS, 3).transpose(0, 2, 1, 3, 4)
        # One product per picture: a batched one may add in another order, and features must not depend on the batch.
        return EncodedImage((patches.reshape(rows * columns, -1) @ self._map).astype(np.float32), (rows, columns))


def random_fingerprint(config: EncoderConfig) -> str:
    """Identity of the features."""
    view = "at most 16 tokens, cut to one of 33 ratios" if config.crop == "bucket" else "square, 16 px"
    return fingerprint({"kind": config.kind, "view": view, "image_px": config.image_px})
