"""Pictures in a labelled grid: what it shows stands above each picture, wrapped to its width.

Drawn with Pillow and its built-in font alone, so that it looks the same on every machine. That font has Latin letters
only; others show as boxes.
"""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN_PX = 8
INK, PAPER, EDGE = (32, 32, 36), (255, 255, 255), (222, 222, 226)


def picture_grid(
    images: Sequence[Image.Image],
    labels: Sequence[str],
    columns: int = 0,
    cell_px: int = 160,
    font_px: int = 14,
    title: str = "",
) -> Image.Image:
    """One RGB picture of all `images`, row by row, each under its label.

    Pictures keep their aspect ratio within cell_px x cell_px.
    columns = 0 chooses about the square root. Labels longer than three lines end in an ellipsis.
    ValueError when there is no picture or the numbers of pictures and labels differ.
    """
    if not images or len(images) != len(labels):
        raise ValueError(f"a grid needs as many labels as pictures, at least one: got {len(labels)}, {len(images)}")
    columns = columns or min(8, math.ceil(math.sqrt(len(images))))
    font = ImageFont.load_default(size=font_px)
    line_px = round(font_px * 1.3)
    texts = [wrap(label, font, cell_px, max_lines=3) for label in labels]
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    text_px = [line_px * max(len(texts[i]) for i in row) for row in rows]
    width = columns * (cell_px + MARGIN_PX) + MARGIN_PX
    heading = wrap(title, ImageFont.load_default(size=font_px + 2), width - 2 * MARGIN_PX, max_lines=2) if title else []
    head_px = len(heading) * (line_px + 4) + (MARGIN_PX if heading else 0)
    height = head_px + sum(text + cell_px + 2 * MARGIN_PX for text in text_px) + MARGIN_PX
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(heading):
        position = (MARGIN_PX, MARGIN_PX + i * (line_px + 4))
        draw.text(position, line, INK, ImageFont.load_default(size=font_px + 2))
    top = head_px + MARGIN_PX
    for row, text in zip(rows, text_px, strict=True):
        for column, i in enumerate(row):
            left = MARGIN_PX + column * (cell_px + MARGIN_PX)
            for number, line in enumerate(texts[i]):
                draw.text((left, top + text + (number - len(texts[i])) * line_px), line, INK, font)
            picture = fit(images[i], cell_px)
            corner = (left + (cell_px - picture.width) // 2, top + text + (cell_px - picture.height) // 2)
            canvas.paste(picture, corner)
            box = (corner[0] - 1, corner[1] - 1, corner[0] + picture.width, corner[1] + picture.height)
            draw.rectangle(box, outline=EDGE)
        top += text + cell_px + 2 * MARGIN_PX
    return canvas


def fit(image: Image.Image, cell_px: int) -> Image.Image:
    """`image` as RGB within cell_px x cell_px, aspect ratio kept; small pictures grow smoothly to the cell."""
    image = image.convert("RGB")
    scale = cell_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int, max_lines: int) -> list[str]:
    """`text` in lines no wider than width_px, broken at spaces and, where a word is too wide, inside it.

    What does not fit in `max_lines` is replaced by an ellipsis. Always at least one line, possibly empty.
    """
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= width_px:
            lines[-1] = candidate
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width_px:
                lines.append("")
            lines[-1] += letter
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and font.getlength(last + "…") > width_px:
        last = last[:-1]
    return [*lines[: max_lines - 1], last + "…"]
