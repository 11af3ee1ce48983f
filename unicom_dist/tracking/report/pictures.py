"""Picture grids over time, embedded in the page; prompts stand above each picture in the grid itself.

Of many steps a few are shown, evenly spread, first and last always; the last is wide, a click widens another.
"""

import base64
import io
from itertools import groupby

from PIL import Image

from unicom_dist.tracking.report.data import Grid, Run
from unicom_dist.tracking.report.html import Child, Markup, join, tag

_MAX_STEPS = 6
_MAX_SIDE_PX = 1600
_TITLES = {
    "prompts": ("Pictures drawn from prompts", "drawn"),
    "reconstruction": ("Reconstructions beside their originals", "reconstructed"),
}


def pictures(run: Run, kind: str) -> Markup | None:
    """All grids of `kind`, stage by stage; None when there are none."""
    blocks: list[Child] = []
    for stage, found in groupby([g for g in run.grids if g.kind == kind], key=lambda grid: grid.stage):
        grids = list(found)
        shown = spread(grids, _MAX_STEPS)
        figures = [figure for g in shown if (figure := _figure(g, wide=g is shown[-1]))]
        if not figures:
            continue
        count = f"{len(shown)} of {len(grids)} steps shown" if len(shown) < len(grids) else ""
        blocks.append(tag("h3", stage, tag("small", count) if count else None))
        blocks.append(tag("div", *reversed(figures), class_="film"))
    return join(*blocks) if blocks else None


def spread(items: list[Grid], most: int) -> list[Grid]:
    """At most `most` items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _figure(grid: Grid, wide: bool) -> Markup | None:
    source = embed(grid)
    if source is None:
        return None
    prompts = grid.details.get("prompts")
    names = ", ".join(str(p) for p in prompts) if isinstance(prompts, list) else ""
    verb = _TITLES.get(grid.kind, ("", "made"))[1]
    image = tag("img", src=source, alt=f"{verb} at step {grid.step}: {names}", loading="lazy")
    return tag("figure", image, tag("figcaption", f"step {grid.step}"), class_="wide" if wide else None)


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
