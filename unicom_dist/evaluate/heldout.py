"""Pictures, captions and features of a shard set, at the size the model draws."""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unicom_dist.config.errors import DataError
from unicom_dist.config.schema import Config
from unicom_dist.data.decode import decode_image, to_square
from unicom_dist.data.npy import read_npy, to_tensor
from unicom_dist.data.pairs import captions_of, grid_of, image_of, open_set
from unicom_dist.data.shardset import ShardSet
from unicom_dist.models.encoders import EncodedImage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """A picture as the decoder would have to draw it, and its caption. Features are read when asked for."""

    key: str
    caption: str
    picture: Image.Image
    grid: tuple[int, int]  # of the features
    read_features: Callable[[], NDArray[np.float32]]

    @property
    def features(self) -> EncodedImage:
        """Encoder features of the picture as it is stored."""
        return EncodedImage(self.read_features(), self.grid)


def read_pairs(config: Config, name: str) -> list[Pair]:
    """All pairs of the set `name` but malformed ones, which are left out. DataError if none is left."""
    pairs, kind, px = open_set(config, name), config.encoder.kind, config.codec.decoder.image_px
    found = []
    for number in range(len(pairs)):
        sample = pairs[number]
        try:
            pixels = to_square(decode_image(image_of(sample), f"{name}/{sample.key}"), px)
            picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            grid = grid_of(sample, kind, "features.npy")
            read = functools.partial(_features, pairs, number, kind)
            found.append(Pair(sample.key, captions_of(sample).main, picture, grid, read))
        except DataError as error:
            log.warning("left out of the evaluation: %s", error.what)
    if not found:
        raise DataError(
            f"{pairs.folder}: no pair can be read", "there is nothing to measure", "run `unicom data check`"
        )
    return found


def _features(pairs: ShardSet, number: int, kind: str) -> NDArray[np.float32]:
    sample = pairs[number]
    return to_tensor(read_npy(sample.parts[kind]["features.npy"], sample.key)).float().numpy()


def to_unit(pictures: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size as [B, 3, H, W] float32 in [0, 1]."""
    arrays = [np.asarray(picture.convert("RGB"), np.float32) / 255 for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def mean_picture(pairs: Sequence[Pair]) -> Image.Image:
    """The average of the pictures, pixel by pixel."""
    total = np.zeros(np.asarray(pairs[0].picture).shape, np.float64)
    for pair in pairs:
        total += np.asarray(pair.picture)
    return Image.fromarray(np.round(total / len(pairs)).astype(np.uint8))
