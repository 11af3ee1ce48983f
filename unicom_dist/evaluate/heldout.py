"""Pictures, captions, features and latents of a shard set, at the size the model draws."""

import functools
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unicom_dist.config.errors import DataError
from unicom_dist.config.schema import Config, held_out_set
from unicom_dist.data.buckets import Buckets
from unicom_dist.data.decode import decode_image
from unicom_dist.data.loader import heldout_sets
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.npy import read_npy, to_tensor, write_npy
from unicom_dist.data.pairs import captions_of, grid_of, image_of, open_set
from unicom_dist.data.shardset import ShardSet, part_name
from unicom_dist.data.tar import ShardWriter
from unicom_dist.models.encoders import EncodedImage
from unicom_dist.sample.loading import find_parts, load_codec
from unicom_dist.sample.pictures import PictureCodec

log = logging.getLogger(__name__)
LATENT = "latent"


@dataclass(frozen=True)
class Pair:
    """A picture as the decoder would have to draw it, and its texts. Features are read when asked for."""

    key: str
    caption: str
    further: tuple[str, ...]  # texts beside the caption
    picture: Image.Image
    grid: tuple[int, int]  # of the features
    read_features: Callable[[], NDArray[np.float32]]

    @property
    def features(self) -> EncodedImage:
        """Encoder features of the picture as it is stored."""
        return EncodedImage(self.read_features(), self.grid)


def read_pairs(config: Config, name: str, encoder: str) -> list[Pair]:
    """All pairs of the set `name` but malformed ones, which are left out.

    DataError if none is left, or the features are not those of the encoder with the fingerprint `encoder`.
    """
    kind, buckets = config.encoder.kind, Buckets(config.codec.decoder)
    pairs = open_set(config, name, expect_fingerprint={kind: encoder})
    found = []
    for number in range(len(pairs)):
        try:
            found.append(read_pair(pairs, number, kind, buckets))
        except DataError as error:
            log.warning("left out of the evaluation: %s", error.what)
    if not found:
        raise DataError(
            f"{pairs.folder}: no pair can be read", "there is nothing to measure", "run `unicom data check`"
        )
    return found


def read_pair(pairs: ShardSet, number: int, kind: str, buckets: Buckets) -> Pair:
    """The pair `number` of a set with `kind` features. DataError if it is malformed."""
    sample = pairs[number]
    pixels = buckets.target(decode_image(image_of(sample), f"{pairs.folder.name}/{sample.key}"))
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    grid = grid_of(sample, kind, "features.npy")
    read = functools.partial(_features, pairs, number, kind)
    captions = captions_of(sample)
    return Pair(sample.key, captions.main, tuple(captions.further), picture, grid, read)


def _features(pairs: ShardSet, number: int, kind: str) -> NDArray[np.float32]:
    sample = pairs[number]
    return to_tensor(read_npy(sample.parts[kind]["features.npy"], sample.key)).float().numpy()


@contextmanager
def heldout_latents(config: Config, model: Path, fingerprint: str, device: torch.device) -> Iterator[Config]:
    """A configuration whose run directory holds the held-out latents of the codec with this fingerprint.

    `config` itself where its latents are that codec's; else they are computed from the features by the codec in
    `model`, a run directory or model folder, and removed at the end.
    """
    names = ["heldout", *map(held_out_set, heldout_sets(config))]
    stored = [Path(config.run_dir) / "latents" / name for name in names if _has_features(config, name)]
    if all(_is_of(folder, fingerprint) for folder in stored):
        yield config
        return
    log.info("%s: no latents of this codec, computed from the features", ", ".join(map(str, stored)))
    codec = load_codec(find_parts(model).codec, device)
    pictures = PictureCodec(codec.model, codec.encoder)
    with tempfile.TemporaryDirectory(prefix="unicom-eval-") as name:
        for folder in stored:
            _write_latents(config, folder.name, pictures, fingerprint, Path(name) / "latents" / folder.name)
        yield config.model_copy(update={"run_dir": name})


def _has_features(config: Config, name: str) -> bool:
    """A set of conversations need not have images of its own."""
    return name == "heldout" or Manifest.file(Path(config.data.path) / name, config.encoder.kind).is_file()


def _is_of(folder: Path, fingerprint: str) -> bool:
    return Manifest.file(folder, LATENT).is_file() and Manifest.read(folder, LATENT).fingerprint == fingerprint


def _write_latents(config: Config, name: str, pictures: PictureCodec, fingerprint: str, folder: Path) -> None:
    pairs = open_set(config, name)
    folder.mkdir(parents=True)
    manifest, number = Manifest(part=LATENT, fingerprint=fingerprint), 0
    for shard in pairs.manifest.shards:
        with ShardWriter(folder / part_name(shard.name, LATENT)) as writer:
            for row in range(number, number + shard.samples):
                if encoded := _encoded(pairs, row, config.encoder.kind):
                    (latents,) = pictures.encode([encoded])
                    members = {
                        "latent.npy": write_npy(latents.values.half().numpy()),
                        "json": json.dumps({"grid": latents.grid}).encode(),
                    }
                    writer.write(pairs.key(row), members)
        manifest.shards.append(writer.entry)
        number += shard.samples
    manifest.write(folder)


def _encoded(pairs: ShardSet, number: int, kind: str) -> EncodedImage | None:
    """Features of a sample; None where they are missing or malformed."""
    try:
        return EncodedImage(_features(pairs, number, kind), grid_of(pairs[number], kind, "features.npy"))
    except DataError:
        return None


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
