"""Pictures of several models in rows, each row named on its left: the same subjects stand below each other."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from unicom_dist.sample.grid import INK, MARGIN_PX, PAPER, fit, wrap


def picture_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], cell_px: int = 72, label_px: int = 190, font_px: int = 13
) -> Image.Image:
    """One RGB picture of `rows` (name, pictures), each picture within cell_px x cell_px.

    Names longer than three lines end in an ellipsis. ValueError without a picture.
    """
    columns = max((len(pictures) for _, pictures in rows), default=0)
    if not columns:
        raise ValueError("a sheet needs pictures")
    font = ImageFont.load_default(size=font_px)
    line_px, step = round(font_px * 1.3), cell_px + MARGIN_PX // 2
    canvas = Image.new("RGB", (label_px + columns * step + MARGIN_PX, len(rows) * step + MARGIN_PX), PAPER)
    draw = ImageDraw.Draw(canvas)
    for number, (name, pictures) in enumerate(rows):
        top = MARGIN_PX + number * step
        lines = wrap(name, font, label_px - 2 * MARGIN_PX, max_lines=3)
        first = top + (cell_px - line_px * len(lines)) / 2
        for place, line in enumerate(lines):
            draw.text((MARGIN_PX, first + place * line_px), line, INK, font)
        for column, picture in enumerate(pictures):
            shown = fit(picture, cell_px)
            left = label_px + column * step
            canvas.paste(shown, (left + (cell_px - shown.width) // 2, top + (cell_px - shown.height) // 2))
    return canvas
