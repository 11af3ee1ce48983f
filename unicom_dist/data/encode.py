"""Pictures as bytes, for files that are written whole."""

import io
from collections.abc import Mapping

from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo


def png_bytes(picture: Image, facts: Mapping[str, object] | None = None) -> bytes:
    """A PNG of `picture`, with `facts` as its text chunks."""
    texts = PngInfo()
    for name, value in (facts or {}).items():
        texts.add_itxt(name, str(value))
    buffer = io.BytesIO()
    picture.save(buffer, "png", pnginfo=texts)
    return buffer.getvalue()
