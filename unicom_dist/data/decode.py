"""Stored images into upright 8-bit sRGB pictures, and those into the decoder's square targets.

The first frame counts. Orientation follows EXIF, embedded colour profiles are converted, 16 bits are scaled to 8,
transparency is laid over white; images of absurd size are refused before they are unpacked.
Square targets: an image of another shape is fitted into the square, centred on white, as a whole.
The cache keeps uint8 targets [3, H, W] up to a number of bytes; samples are drawn evenly, so nothing is ever evicted.
"""

import io
from collections.abc import Callable
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from unicom_dist.config.errors import DataError

IMAGE_EXTENSIONS = ("webp", "png", "jpg", "jpeg")  # of the members of a shard
MAX_PIXELS = 64_000_000
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow would start other programs for some
Pixels = NDArray[np.uint8]
_ORIENTATION, _TRANSPOSED = 0x0112, (5, 6, 7, 8)  # EXIF: the orientations that exchange width and height


def decode_image(content: bytes | memoryview, name: str) -> Image.Image:
    """An upright RGB image. DataError, naming `name`: not an image, damaged, or more than 64 million pixels."""
    return over_white(open_picture(content, name))


def open_picture(content: bytes | memoryview, name: str) -> Image.Image:
    """The same with its transparency: RGB, or RGBA where it has any."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height} pixels"
                raise DataError(f"{name}: {size}", f"the limit is {MAX_PIXELS:,}", "make the image smaller")
            upright = ImageOps.exif_transpose(image)
            return to_srgb(to_eight_bits(upright))
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise _unreadable(name, f"it is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # a damaged or hostile file makes Pillow raise nearly anything
        raise _unreadable(name, str(error)) from error


def _unreadable(name: str, why: str) -> DataError:
    return DataError(f"{name}: the image cannot be read", why, "replace or remove the image")


def header_size(file: IO[bytes]) -> tuple[int, int]:
    """(width, height) of the upright image from its header alone; (0, 0) where that cannot be read."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            turned = image.getexif().get(_ORIENTATION) in _TRANSPOSED
            return (image.height, image.width) if turned else image.size
    except Exception:  # as above
        return 0, 0


def to_eight_bits(image: Image.Image) -> Image.Image:
    """Integers of 16 bits and floats in [0, 1] as grey levels 0 to 255; other images as they are.

    Pillow itself would cut all above 255 off. ValueError: values beyond, whose white nobody knows.
    """
    if image.mode == "F":
        values = np.asarray(image, np.float64)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError("floating-point values beyond 0 and 1")
        values = values * 65535
    elif image.mode.startswith("I"):  # I;16 in either byte order, and I, in which Pillow hands out 16 bits as well
        values = np.asarray(image, np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("integers beyond 16 bits")
    else:
        return image
    levels = np.round(values / 257).astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        opaque = np.where(np.asarray(image) == clear, 0, 255).astype(np.uint8)
        return Image.merge("LA", (Image.fromarray(levels), Image.fromarray(opaque)))
    grey = Image.fromarray(levels)
    grey.info.update({key: value for key, value in image.info.items() if key == "icc_profile"})
    return grey


def to_srgb(image: Image.Image) -> Image.Image:
    """RGB, or RGBA where the image has transparency, by its colour profile; one that cannot be used is ignored."""
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    colours = image.convert("RGB") if image.mode in ("1", "P", "PA", "RGBA") else image
    colours = colours.convert("L") if colours.mode == "LA" else colours
    picture = _by_profile(colours, image.info.get("icc_profile")) or colours.convert("RGB")
    for used in ("icc_profile", "transparency"):
        picture.info.pop(used, None)
    if alpha is not None:
        picture.putalpha(alpha)
    return picture


def _by_profile(colours: Image.Image, profile: bytes | None) -> Image.Image | None:
    """sRGB pixels; None where there is no profile, it is sRGB's own, damaged, or for another kind of pixels."""
    if not profile:
        return None
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in (given.profile.profile_description or ""):
            return None
        return ImageCms.profileToProfile(colours, given, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, ImportError, OSError, ValueError, TypeError):
        return None


def flatten(image: Image.Image) -> Image.Image:
    """Any Pillow image as `decode_image` would give it back. ValueError: pixels that cannot be converted."""
    return over_white(to_srgb(to_eight_bits(image)))


def over_white(image: Image.Image) -> Image.Image:
    """RGB of an RGB or RGBA image, with transparent parts over white."""
    if image.mode == "RGBA":
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image


def to_square(image: Image.Image, px: int) -> Pixels:
    """[3, px, px] uint8: the RGB `image` fitted into a white square."""
    if image.width != image.height:
        image = ImageOps.pad(image, (px, px), Image.Resampling.LANCZOS, color="white")
    elif image.width != px:
        image = image.resize((px, px), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


class TargetCache:
    """Targets by sample number, up to `limit_bytes`."""

    def __init__(self, limit_bytes: int = 256 << 20) -> None:
        self._room = limit_bytes
        self._targets: dict[int, Pixels] = {}

    def get(self, number: int, make: Callable[[], Pixels]) -> Pixels:
        """The target of sample `number`, as `make` makes it unless it is held."""
        target = self._targets.get(number)
        if target is None:
            target = make()
            if target.nbytes <= self._room:
                self._targets[number] = target
                self._room -= target.nbytes
        return target
