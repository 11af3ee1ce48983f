"""Picture grids over time, embedded in the page; prompts stand above each picture in the grid itself.

Of many steps a few are shown, evenly spread, first and last always; a click enlarges one.
"""

import base64
import io
from itertools import groupby

from PIL import Image

from unicom_dist.tracking.report.data import Grid, Run
from unicom_dist.tracking.report.html import Child, Markup, join, tag

_MAX_STEPS = 5
_MAX_SIDE_PX = 1600


def pictures(run: Run, kind: str) -> Markup | None:
    """The newest grid of `kind` large, then what each stage's looked like over its steps; None when there are none."""
    grids = [grid for grid in run.grids if grid.kind == kind]
    newest = next((figure for grid in reversed(grids) if (figure := _figure(grid, lead=True))), None)
    if newest is None:
        return None
    blocks: list[Child] = [tag("div", newest, class_="lead")]
    for stage, found in groupby(grids, key=lambda grid: grid.stage):
        of_stage = list(found)
        shown = [grid for grid in spread(of_stage, _MAX_STEPS) if grid is not grids[-1]]
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
    source = embed(grid)
    if source is None:
        return None
    prompts = grid.details.get("prompts")
    names = ", ".join(str(p) for p in prompts) if isinstance(prompts, list) else ""
    where = f"{grid.stage}, step {grid.step}" if lead else f"step {grid.step}"
    return tag("figure", tag("img", src=source, alt=f"{where}: {names}"), tag("figcaption", where))


def embed(grid: Grid) -> str | None:
    """The picture as a data address, as WebP where that is smaller; None when the file is not a picture."""
    try:
        original = grid.path.read_bytes()
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
    """Captions the model wrote for held-out images beside the given ones, from the newest details that have them."""
    for grid in reversed(run.grids):
        written = grid.details.get("captions")
        if isinstance(written, list) and written:
            items = [
                tag("li", tag("q", c.get("generated", "")), tag("small", f"given: {c.get('reference', '')}"))
                for c in written
                if isinstance(c, dict)
            ]
            if items:
                return tag("ul", *items, class_="captions")
    return None
