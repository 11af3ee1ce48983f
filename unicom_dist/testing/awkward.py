"""Pictures as they come in practice: every kind that is easily misread, and what has to be refused.

`awkward_pictures()` is the table that the tests of every place that reads pictures go through.
"""

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

Colour = tuple[int, int, int]
RED, BLUE, WHITE, GREY = (255, 0, 0), (0, 0, 255), (255, 255, 255), (128, 128, 128)


@dataclass(frozen=True)
class Awkward:
    """A picture file. `colour` of its upper left corner as sRGB; `refusal` is a part of the message, "" = readable."""

    content: bytes
    size: tuple[int, int] = (6, 4)
    colour: Colour = RED
    refusal: str = ""


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The content of a picture file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, kind: int, rows: bytes) -> bytes:
    """A PNG of given bit depth and colour kind (0 grey, 2 RGB), its image data as they are (RFC 2083)."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def exchanged_profile() -> bytes:
    """sRGB's colour profile with the red and blue primaries exchanged and another name."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
    return profile.replace(b"rXYZ", b"tmpZ").replace(b"bXYZ", b"rXYZ").replace(b"tmpZ", b"bXYZ")


def awkward_pictures() -> dict[str, Awkward]:
    """By name."""
    red = Image.new("RGB", (6, 4), RED)
    noise = encoded(Image.effect_noise((99, 99), 50))
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    halves = np.full((4, 6), 0x8080, np.uint16)
    rows16 = (b"\0" + b"\x80\x00" * 18) * 4
    return {
        "one-pixel": Awkward(encoded(Image.new("RGB", (1, 1), RED)), (1, 1)),
        "very-wide": Awkward(encoded(Image.new("RGB", (20_000, 10), RED)), (20_000, 10)),
        "cmyk": Awkward(encoded(Image.new("CMYK", (6, 4), (0, 255, 255, 0)), "JPEG", quality=95)),
        "grey-16-bit": Awkward(encoded(Image.fromarray(halves)), colour=GREY),
        "tiff-16-bit": Awkward(encoded(Image.fromarray(halves), "TIFF"), colour=GREY),
        "colour-16-bit": Awkward(png(6, 4, 16, 2, rows16), colour=GREY),
        "one-bit": Awkward(encoded(Image.new("1", (6, 4), 1)), colour=WHITE),
        "palette": Awkward(encoded(red.convert("P", palette=Image.Palette.ADAPTIVE))),
        "clear-palette": Awkward(encoded(_palette(), transparency=0), colour=WHITE),
        "alpha": Awkward(encoded(Image.new("RGBA", (6, 4), (255, 0, 0, 127))), colour=(255, 128, 128)),
        "grey-alpha": Awkward(encoded(Image.new("LA", (6, 4), (0, 0))), colour=WHITE),
        "animated-gif": Awkward(_animated("GIF")),
        "animated-webp": Awkward(_animated("WEBP", lossless=True)),
        "turned": Awkward(encoded(red, exif=turned), (4, 6)),
        "float": Awkward(encoded(Image.fromarray(np.full((4, 6), 0.5, np.float32)), "TIFF"), colour=GREY),
        "profile": Awkward(encoded(red, icc_profile=exchanged_profile()), colour=BLUE),
        "damaged-profile": Awkward(encoded(red, icc_profile=b"no profile")),
        "beyond-float": Awkward(
            encoded(Image.fromarray(np.full((4, 6), 7, np.float32)), "TIFF"), refusal="beyond 0 and 1"
        ),
        "truncated": Awkward(noise[: len(noise) // 2], refusal="cannot be read"),
        "empty": Awkward(b"", refusal="cannot be read"),
        "text": Awkward(b"not an image", refusal="cannot be read"),
        "huge": Awkward(png(9_000, 9_000, 8, 0, b"\0"), refusal="9000 x 9000 pixels"),
        "bomb": Awkward(png(30_000, 30_000, 8, 0, b"\0"), refusal="decompression bomb"),
        "program": Awkward(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n%%EOF", refusal="cannot be read"),
    }


def near(pixel: Sequence[int], colour: Colour, by: int = 3) -> bool:
    """Whether a pixel has the colour, but for what a lossy format changes."""
    return all(abs(int(one) - other) <= by for one, other in zip(pixel, colour, strict=True))


def _palette() -> Image.Image:
    image = Image.new("P", (6, 4), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return image


def _animated(kind: str, **options: object) -> bytes:
    frames = [Image.new("RGB", (6, 4), colour) for colour in (RED, BLUE)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
