"""A randomly initialised encoder, for tests only: its features depend on the picture and mean nothing.

The picture is reduced to 16 x 16 pixels and each 4 x 4 of them mapped linearly to 24 channels: 16 tokens, no weights on
disk.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from unicom_dist.config.schema import EncoderConfig
from unicom_dist.models.encoders.base import EncodedImage, Prepared, fingerprint, square_view

GRID = 4
SUBPIXELS = 4
CHANNELS = 24


class RandomEncoder:
    """The `random` encoder: a fixed linear map of coarse patches."""

    channels = CHANNELS
    max_tokens = GRID * GRID

    def __init__(self, config: EncoderConfig) -> None:
        self.fingerprint = random_fingerprint(config)
        self._map = np.random.default_rng(0).standard_normal((SUBPIXELS**2 * 3, CHANNELS)).astype(np.float32) / 4

    def describe(self) -> str:
        return f"random linear map, {GRID}x{GRID} tokens of {CHANNELS} channels (for tests, no semantics)"

    def preprocess(self, image: Image.Image) -> Prepared:
        return {"pixels": np.asarray(square_view(image, GRID * SUBPIXELS))}

    def encode(self, batch: Sequence[Prepared]) -> list[EncodedImage]:
        pixels = np.stack([item["pixels"] for item in batch]).astype(np.float32) / 127.5 - 1
        patches = pixels.reshape(-1, GRID, SUBPIXELS, GRID, SUBPIXELS, 3).transpose(0, 1, 3, 2, 4, 5)
        tokens = patches.reshape(len(batch), GRID * GRID, -1)
        # One product per picture: a batched one may add in another order, and features must not depend on the batch.
        return [EncodedImage((token @ self._map).astype(np.float32), (GRID, GRID)) for token in tokens]


def random_fingerprint(config: EncoderConfig) -> str:
    """Identity of the features."""
    return fingerprint({"kind": config.kind, "view": "square, 16 px", "image_px": config.image_px})
