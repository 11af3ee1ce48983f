"""A record into the samples that are stored: the picture as it is, and augmented views of it.

View 0 is the picture over white. A further view is moved, scaled, turned a little, perhaps mirrored, over a random
plain colour; what is drawn depends on (seed, key, view) alone. Everything is stored as lossless WebP, RGB.
"""

import colorsys
import io
import json
import math
import random
from typing import NamedTuple

from PIL import Image

from pipelines.sources import Record
from unicom_dist.config.errors import DataError
from unicom_dist.data.decode import open_picture


class Stored(NamedTuple):
    """Key and {extension: content} of one stored sample."""

    key: str
    members: dict[str, bytes]


def read_picture(record: Record) -> Image.Image:
    """The upright picture, RGBA if it has transparency, else RGB. DataError: missing, damaged, absurdly large."""
    try:
        content = record.read()
    except FileNotFoundError as error:
        raise DataError("the file does not exist") from error
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror or error}") from error
    return open_picture(content, record.key)


def make_views(record: Record, views: range, image_px: int, seed: int) -> list[Stored]:
    """The stored samples of `views` of one record. DataError, in a few words, if the picture cannot be used."""
    picture = _reduced(record, image_px)
    stored = []
    for view in views:
        image = _over(picture, (255, 255, 255)) if view == 0 else augment(picture, record, view, seed)
        caption = {
            "caption": record.captions[0],
            "captions": list(record.captions[1:]),
            "source": record.source,
            "view": view,
        }
        key = record.key if view == 0 else f"{record.key}-v{view}"
        stored.append(Stored(key, {"webp": _encoded(image), "json": json.dumps(caption, ensure_ascii=False).encode()}))
    return stored


def stored_picture(record: Record, image_px: int) -> bytes:
    """The picture of view 0 alone. DataError as `make_views`."""
    return _encoded(_over(_reduced(record, image_px), (255, 255, 255)))


def _reduced(record: Record, image_px: int) -> Image.Image:
    """With no side longer than `image_px`."""
    picture = read_picture(record)
    scale = image_px / max(picture.size)
    if scale < 1:
        size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return picture


def _encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "webp", lossless=True, quality=20, method=0)
    return buffer.getvalue()


def augment(picture: Image.Image, record: Record, view: int, seed: int) -> Image.Image:
    """A view of `picture`, same size: scaled by 0.7 to 1.05, shifted, turned by up to 10 degrees, perhaps mirrored."""
    draw = random.Random(f"{seed}/{record.key}/{view}")
    # Value is drawn towards 1 and saturation towards 0: real pictures stand on light, dull grounds more often.
    hue, saturation, value = draw.random(), 0.9 * draw.random() ** 1.5, 1 - 0.9 * draw.random() ** 2
    colour = colorsys.hsv_to_rgb(hue, saturation, value)
    ground = (round(255 * colour[0]), round(255 * colour[1]), round(255 * colour[2]))
    scale, angle = draw.uniform(0.7, 1.05), math.radians(draw.uniform(-10, 10))
    width, height = picture.size
    room_x, room_y = (0.03 + abs(1 - scale) / 2) * width, (0.03 + abs(1 - scale) / 2) * height
    shift_x, shift_y = draw.uniform(-room_x, room_x), draw.uniform(-room_y, room_y)
    layer = picture.convert("RGBa")  # premultiplied: colours of transparent pixels do not bleed into the edge
    if draw.random() < 0.5 and record.may_mirror:
        layer = layer.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    x0, y0 = width / 2 + shift_x, height / 2 + shift_y
    inverse = (cos, sin, width / 2 - cos * x0 - sin * y0, -sin, cos, height / 2 + sin * x0 - cos * y0)
    moved = layer.transform(picture.size, Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC)
    return _over(moved.convert("RGBA"), ground)


def _over(picture: Image.Image, ground: tuple[int, int, int]) -> Image.Image:
    if picture.mode == "RGB":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, (*ground, 255)), picture).convert("RGB")
