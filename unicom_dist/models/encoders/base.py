"""What every frozen image encoder offers, and the identity that its features carry.

Shapes: H, W pixels; n tokens of D channels, laid out row by row on a grid of (rows, columns), n = rows x columns.
Preprocessing is split from encoding so that pictures can be prepared on other threads while the encoder works.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unicom_dist.config.errors import ConfigError

Prepared = dict[str, NDArray[Any]]
DOCS = "docs/data.md"


class EncodedImage(NamedTuple):
    """Features [n, D] float32 and the grid (rows, columns) with rows x columns = n."""

    features: NDArray[np.float32]
    grid: tuple[int, int]


class Encoder(Protocol):
    """A frozen image encoder. One instance belongs to one process; nothing in it depends on the batch."""

    @property
    def channels(self) -> int:
        """Channels D of a token."""

    @property
    def max_tokens(self) -> int:
        """Most tokens an image can have."""

    @property
    def fingerprint(self) -> str:
        """Digest of weights, kind, processing, resolution and precision; see `fingerprint`."""

    def describe(self) -> str:
        """One line for the screen and the manifest that says what this network is."""

    def preprocess(self, image: Image.Image) -> Prepared:
        """RGB picture of any size -> arrays for `encode`."""

    def encode(self, batch: Sequence[Prepared]) -> list[EncodedImage]:
        """Features of each picture, in order."""


def fingerprint(identity: Mapping[str, Any]) -> str:
    """sha256 over what determines the features, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def weights_digest(files: Sequence[Path]) -> str:
    """sha256 over the contents of the weight files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda p: p.name):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def weights_file(folder: str, kind: str) -> Path:
    """`folder/model.safetensors`. ConfigError if it is not there."""
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise ConfigError(
            f"encoder.path = {folder!r}: no model.safetensors there",
            f"the weights of {kind} are read from a local folder and never downloaded on the way",
            "run `unicom data fetch`, or name the folder that holds them",
            DOCS,
        )
    return path


def wrong_weights(folder: str | Path, kind: str, why: str) -> ConfigError:
    """The error for a folder whose weights are another network's."""
    return ConfigError(
        f"encoder.path = {str(folder)!r} does not hold {kind} weights",
        why.splitlines()[0][:200],
        "name the folder of this encoder, or set encoder.kind to what the folder holds",
        DOCS,
    )


def square_view(image: Image.Image, side: int) -> Image.Image:
    """The whole picture as a square of `side` pixels; a picture that is not square is padded with white, centred."""
    image = image.convert("RGB")
    if image.width != image.height:
        longest = max(image.size)
        canvas = Image.new("RGB", (longest, longest), (255, 255, 255))
        canvas.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
        image = canvas
    return image if image.width == side else image.resize((side, side), Image.Resampling.BICUBIC)
