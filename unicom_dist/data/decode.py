"""Stored images into the decoder's targets.

Orientation follows EXIF, transparency is laid over white, images of absurd size are refused before they are unpacked.
Targets are squares; an image of another shape is fitted into the square, centred on white, as a whole.
The cache keeps uint8 targets [3, px, px] up to a number of bytes; samples are drawn evenly, so nothing is ever evicted.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from unicom_dist.config.errors import DataError

MAX_PIXELS = 64_000_000
Pixels = NDArray[np.uint8]


def decode_image(content: bytes | memoryview, name: str) -> Image.Image:
    """An upright RGB image. DataError, naming `name`: not an image, damaged, or more than 64 million pixels."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{name}: {image.width} x {image.height} pixels", f"the limit is {MAX_PIXELS:,}")
            return flatten(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: the image cannot be read", str(error), "replace or remove the image") from error


def flatten(image: Image.Image) -> Image.Image:
    """RGB, with transparent parts over white."""
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return image.convert("RGB")


def to_square(image: Image.Image, px: int) -> Pixels:
    """[3, px, px] uint8: the RGB `image` fitted into a white square."""
    if image.width != image.height:
        image = ImageOps.pad(image, (px, px), Image.Resampling.LANCZOS, color="white")
    elif image.width != px:
        image = image.resize((px, px), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


class TargetCache:
    """Decoded targets by sample number, up to `limit_bytes`."""

    def __init__(self, px: int, limit_bytes: int = 256 << 20) -> None:
        self.px = px
        self._room = limit_bytes // (3 * px * px)
        self._targets: dict[int, Pixels] = {}

    def get(self, number: int, content: bytes | memoryview, name: str) -> Pixels:
        """The target of sample `number`, decoded from `content` unless it is held. DataError as `decode_image`."""
        target = self._targets.get(number)
        if target is None:
            target = to_square(decode_image(content, name), self.px)
            if len(self._targets) < self._room:
                self._targets[number] = target
        return target
