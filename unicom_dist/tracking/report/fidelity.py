"""What the reconstruction suite adds to its rows: the protocol in words, and figures per size of the pictures."""

from typing import Any

from unicom_dist.tracking.report.data import Run
from unicom_dist.tracking.report.html import Child, Markup, join, table, tag
from unicom_dist.tracking.report.tables import figure, suites

_TITLES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS (VGG)", "cosine": "feature cosine"}


def fidelity(run: Run) -> Markup | None:
    """None where the suite was not run. Sizes are listed when there are several."""
    suite = suites(run).get("reconstruction")
    if suite is None:
        return None
    protocol = suite.get("protocol")
    words: list[Child] = []
    for name, text in protocol.items() if isinstance(protocol, dict) else ():
        words += [tag("dt", str(name)), tag("dd", str(text))]
    sizes = suite.get("sizes")
    listed = [size for size in sizes if isinstance(size, dict)] if isinstance(sizes, list) else []
    head: list[Child] = ["size", "n", *_TITLES.values()]
    rows = [_row(size) for size in listed]
    numeric = tuple(range(1, len(head)))
    return join(table(head, rows, numeric) if len(rows) > 1 else None, tag("dl", *words) if words else None)


def _row(size: dict[str, Any]) -> list[Child]:
    cells: list[Child] = [f"{size.get('width')} x {size.get('height')}", size.get("n")]
    for name in _TITLES:
        measured = size.get(name)
        if not isinstance(measured, dict):
            cells.append("")
            continue
        interval = measured.get("ci") or []
        shown = f" ({' – '.join(figure(bound) for bound in interval)})" if interval else ""
        cells.append(f"{figure(measured.get('value'))}{shown}")
    return cells
