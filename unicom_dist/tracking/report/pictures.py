"""Picture grids over time, embedded in the page; prompts stand above each picture in the grid itself.

Of many steps a few are shown, evenly spread, first and last always; a click enlarges one.
"""

import base64
import io
from itertools import groupby
from pathlib import Path

from PIL import Image

from unicom_dist.tracking.report.data import Grid, Run
from unicom_dist.tracking.report.html import Child, Markup, join, tag

_MAX_STEPS = 5
_MAX_SIDE_PX = 1600


def pictures(run: Run, kind: str) -> Markup | None:
    """Large the grids of an evaluation, or the newest one; then each stage's over its steps. None without any."""
    grids = [grid for grid in run.grids if grid.kind == kind]
    leading = [grid for grid in grids if grid.step is None] or grids[-1:]
    leads = [figure for grid in leading if (figure := _figure(grid, lead=True))]
    if not leads:
        return None
    blocks: list[Child] = [tag("div", *leads, class_="lead")]
    for stage, found in groupby([grid for grid in grids if grid.step is not None], key=lambda grid: grid.stage):
        shown = [grid for grid in spread(list(found), _MAX_STEPS) if grid not in leading]
        figures = [figure for grid in shown if (figure := _figure(grid))]
        if figures:
            blocks.append(tag("h3", stage, tag("small", "over its steps; click to enlarge")))
            blocks.append(tag("div", *figures, class_="film"))
    return join(*blocks)


def spread(items: list[Grid], most: int) -> list[Grid]:
    """At most `most` items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _figure(grid: Grid, lead: bool = False) -> Markup | None:
    source = embed(grid.path)
    if source is None:
        return None
    labels = grid.details.get("labels")
    names = ", ".join(str(label) for label in labels) if isinstance(labels, list) else ""
    at = f"step {grid.step}" if grid.step is not None else grid.path.stem.replace("-", " ")
    where = f"{grid.stage}, {at}" if lead else at
    return tag("figure", tag("img", src=source, alt=f"{where}: {names}"), tag("figcaption", where))


def embed(path: Path) -> str | None:
    """The picture in a file as a data address, as WebP where that is smaller; None when the file is not a picture."""
    try:
        original = path.read_bytes()
        with Image.open(io.BytesIO(original)) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    image.thumbnail((_MAX_SIDE_PX, 4 * _MAX_SIDE_PX))
    packed = io.BytesIO()
    image.save(packed, "WEBP", quality=88, method=4)
    kind, data = min((("webp", packed.getvalue()), ("png", original)), key=lambda item: len(item[1]))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def captions(run: Run) -> Markup | None:
    """What the evaluated model wrote about held-out images, each with the caption that was given. None without any."""
    written = run.evaluation.get("captions")
    items = [
        tag("li", tag("q", item.get("generated", "")), tag("small", f"given: {item.get('truth', '')}"))
        for item in (written if isinstance(written, list) else [])
        if isinstance(item, dict)
    ]
    return tag("ul", *items, class_="captions") if items else None
