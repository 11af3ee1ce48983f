"""Originals and their reconstructions, some at a time: of a codec and the held-out set, or of two folders.

Both are 8-bit RGB pictures of the same size and the same part of the scene: comparing with another crop of the
original, or before rounding to 8 bits, gives other figures.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from pydantic import ValidationError

from unicom_dist.checkpoint.weights import read_weights_config
from unicom_dist.config.errors import CheckpointError, DataError
from unicom_dist.config.schema import CodecConfig, Config, EncoderConfig
from unicom_dist.config.storage import reason
from unicom_dist.data.buckets import Buckets, Shape
from unicom_dist.data.decode import decode_image
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.pairs import open_set, spread
from unicom_dist.evaluate.heldout import Pair, read_pair
from unicom_dist.parallel.precision import training_dtype
from unicom_dist.sample.loading import find_parts, load_codec, with_fingerprint
from unicom_dist.sample.pictures import PictureCodec

DOCS = "docs/evaluation.md"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class PicturePair(NamedTuple):
    """Two RGB pictures of one size."""

    key: str
    original: Image.Image
    rebuilt: Image.Image


class PictureSource(Protocol):
    """Pairs by number. What is returned depends on the number alone, not on who asks or what for."""

    name: str
    keys: list[str]

    @property
    def identity(self) -> dict[str, Any]:
        """What the pictures depend on, as plain JSON values."""

    @property
    def facts(self) -> dict[str, str]:
        """How the pictures were made, in words, for the result."""

    def pairs(self, numbers: Sequence[int]) -> tuple[list[PicturePair], list[str]]:
        """The pairs, and why others of these numbers cannot be measured."""

    def originals(self, numbers: Sequence[int]) -> list[Image.Image]:
        """The originals alone, without those that cannot be measured."""


def key_seed(seed: int, key: str) -> int:
    """The seed of a picture's noise: of its key, so that it is the same in any part of any set."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:6], "big")


def with_codec_of(model: str | Path, config: Config) -> Config:
    """`config` with the encoder and the codec of a run directory or model folder. CheckpointError: there is none."""
    folder = find_parts(model).codec
    try:
        content = read_weights_config(folder)
        encoder = EncoderConfig.model_validate(content["encoder"])
        codec = CodecConfig.model_validate(content["codec"])
    except (KeyError, ValidationError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".splitlines()[:3])
        raise CheckpointError(f"{folder}/config.json does not describe a codec", why, "export it again") from None
    return config.model_copy(update={"encoder": encoder, "codec": codec})


class CodecPairs:
    """The held-out pictures at the size they are drawn in, and what a codec makes of their features.

    config: with the codec's own sections (`with_codec_of`). limit: so many pictures, evenly spread over the set; 0 =
    all. DataError: no held-out set, or another encoder's features.
    """

    name = "heldout"

    def __init__(self, model: str | Path, config: Config, limit: int = 0) -> None:
        self._folder = find_parts(model).codec
        self._content = with_fingerprint(read_weights_config(self._folder), self._folder)
        self._config, self._kind = config, config.encoder.kind
        self._buckets = Buckets(config.codec.decoder)
        expected: dict[str, str] = {self._kind: self._content["encoder_fingerprint"]}
        self._set = open_set(config, "heldout", expect_fingerprint=expected)
        self._rows = spread(limit or len(self._set), len(self._set))
        self.keys = [self._set.key(row) for row in self._rows]

    @cached_property
    def codec(self) -> PictureCodec:
        """Loaded when the first picture is drawn, in the precision it was trained in."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        stages = self._config.stages
        dtype = training_dtype(stages[-1].precision if stages else "auto", device)
        loaded = load_codec(self._folder, device, dtype)
        return PictureCodec(loaded.model, loaded.encoder, loaded.content)

    @property
    def identity(self) -> dict[str, Any]:
        """Codec, data and solver."""
        manifest = Manifest.read(self._set.folder)
        return {
            "codec": self._content["fingerprint"],
            "data": [shard.sha256 for shard in manifest.shards],
            "keys": len(self.keys),
            "sample": self._config.sample.model_dump(mode="json", exclude={"prompts"}),
        }

    @property
    def facts(self) -> dict[str, str]:
        """Solver and seeds, crop and quantisation."""
        sample = self._config.sample
        crop = "cut to one of 33 ratios" if self._buckets.aspect else "whole, on a white square"
        return {
            "originals": f"held-out pictures, {crop}, Lanczos to the decoder's size, 8 bits",
            "reconstructions": f"{sample.decoder_steps} {sample.solver} steps, guidance {sample.decoder_guidance:g}, "
            f"seed {sample.seed} with the picture's key, rounded to 8 bits",
        }

    def pairs(self, numbers: Sequence[int]) -> tuple[list[PicturePair], list[str]]:
        """Read and draw. Malformed pairs are left out."""
        found, left_out = self._read(numbers)
        if not found:
            return [], left_out
        sample = self._config.sample
        rebuilt = self.codec.reconstruct(
            [pair.features for pair in found],
            [key_seed(sample.seed, pair.key) for pair in found],
            sample.decoder_steps,
            sample.solver,
            [Shape(pair.picture.height, pair.picture.width) for pair in found],
            sample.decoder_guidance,
        )
        drawn = zip(found, rebuilt, strict=True)
        return [PicturePair(pair.key, pair.picture, picture) for pair, picture in drawn], left_out

    def originals(self, numbers: Sequence[int]) -> list[Image.Image]:
        """Read, without drawing."""
        return [pair.picture for pair in self._read(numbers)[0]]

    def _read(self, numbers: Sequence[int]) -> tuple[list[Pair], list[str]]:
        found: list[Pair] = []
        left_out: list[str] = []
        for number in numbers:
            try:
                found.append(read_pair(self._set, self._rows[number], self._kind, self._buckets))
            except DataError as error:
                left_out.append(error.what)
        return found, left_out


class FolderPairs:
    """The pictures of two folders, matched by their names without suffix.

    DataError: no picture, names that are in one folder only, and later a picture that cannot be read or sizes that
    differ: a codec that fails on a picture must not gain by it.
    """

    def __init__(self, originals: str | Path, reconstructions: str | Path, limit: int = 0) -> None:
        self._originals, self._rebuilt = _pictures(Path(originals)), _pictures(Path(reconstructions))
        self.name = Path(reconstructions).name
        only = self._originals.keys() ^ self._rebuilt.keys()
        if only:
            first = min(only)
            where = originals if first in self._originals else reconstructions
            raise DataError(
                f"{len(self._originals)} pictures in {originals}, {len(self._rebuilt)} in {reconstructions}",
                f"{len(only)} of them have no partner, the first is {first} in {where}",
                "give both folders the same names (suffixes may differ)",
                DOCS,
            )
        names = sorted(self._originals)
        self.keys = [names[number] for number in spread(limit or len(names), len(names))]

    @property
    def identity(self) -> dict[str, Any]:
        """Size and time of every file."""
        files = [folder[key] for folder in (self._originals, self._rebuilt) for key in self.keys]
        return {"files": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]}

    @property
    def facts(self) -> dict[str, str]:
        """Files as they are."""
        return {"originals": "files, as they are, 8 bits", "reconstructions": "files, as they are, 8 bits"}

    def pairs(self, numbers: Sequence[int]) -> tuple[list[PicturePair], list[str]]:
        """Read both files of each."""
        return [self._pair(self.keys[number]) for number in numbers], []

    def originals(self, numbers: Sequence[int]) -> list[Image.Image]:
        """Read the originals."""
        return [_open(self._originals[self.keys[number]]) for number in numbers]

    def _pair(self, key: str) -> PicturePair:
        original, rebuilt = (_open(folder[key]) for folder in (self._originals, self._rebuilt))
        if original.size != rebuilt.size:
            raise DataError(
                f"{key}: {original.width} x {original.height} px original, {rebuilt.width} x {rebuilt.height} px "
                "reconstruction",
                "pictures of different sizes cannot be compared, and resizing one would change the figures",
                "save the originals with the crop and size the codec was given",
                DOCS,
            )
        return PicturePair(key, original, rebuilt)


def _pictures(folder: Path) -> dict[str, Path]:
    """Paths by name without suffix. DataError: none, or two of one name."""
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        why = f"no {' '.join(SUFFIXES)} in it" if folder.is_dir() else "there is no such folder"
        raise DataError(f"{folder}: no pictures", why, "name a folder of pictures", DOCS)
    found: dict[str, Path] = {}
    for path in paths:
        if path.stem in found:
            raise DataError(
                f"{found[path.stem]} and {path.name}", "pictures are matched by name without suffix", "rename one", DOCS
            )
        found[path.stem] = path
    return found


def _open(path: Path) -> Image.Image:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read", reason(error), "make it readable", DOCS) from None
    return decode_image(content, str(path))
