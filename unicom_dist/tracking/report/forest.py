"""Estimates with their intervals below each other, as inline SVG: a dot and a bar per row on a common scale."""

import math
from dataclasses import dataclass

from unicom_dist.tracking.report.charts import Axis, number, ticks
from unicom_dist.tracking.report.html import Child, Markup, tag

WIDTH, ROW, NAMES = 760, 20, 250  # pixels: of the chart, of a row, of the rows' names
_TOP, _BOTTOM, _RIGHT = 6, 24, 130


@dataclass(frozen=True)
class Bar:
    """A row: its name, the estimate, its interval (infinite: not known) and a colour."""

    name: str
    mean: float
    low: float
    high: float
    color: str


def forest(title: str, bars: list[Bar], unit: str = "", zero: str = "", digits: int = 2) -> Markup | None:
    """The chart of `bars`, None without any. With `zero` a line at 0 stands for what they are compared with.

    digits: behind the point, of the figures beside the bars.
    """
    bars = [bar for bar in bars if math.isfinite(bar.mean)]
    if not bars:
        return None
    ends = [end for bar in bars for end in (bar.low, bar.mean, bar.high) if math.isfinite(end)]
    low, high = min([*ends, 0.0] if zero else ends), max([*ends, 0.0] if zero else ends)
    pad = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    axis = Axis(low - pad, high + pad, NAMES, WIDTH - _RIGHT)
    bottom = _TOP + ROW * len(bars)
    marks: list[Child] = []
    for value in ticks(axis, 7):
        x = round(axis.px(value), 1)
        marks.append(tag("line", class_="grid", x1=x, x2=x, y1=_TOP, y2=bottom))
        marks.append(tag("text", number(value), x=x, y=bottom + 14, text_anchor="middle"))
    if zero:
        x = round(axis.px(0), 1)
        marks.append(tag("line", class_="axis", x1=x, x2=x, y1=_TOP, y2=bottom))
    for place, bar in enumerate(bars):
        marks += _row(bar, _TOP + ROW * (place + 0.5), axis, digits)
    height = bottom + _BOTTOM
    label = f"{title}: {', '.join(f'{bar.name} {number(bar.mean)}' for bar in bars)}"
    svg = tag("svg", *marks, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=label)
    note = ", ".join(part for part in (unit, f"0 = {zero}" if zero else "") if part)
    caption = tag("figcaption", tag("b", title), tag("span", note, class_="unit"))
    return tag("figure", caption, svg, class_="chart")


def _row(bar: Bar, y: float, axis: Axis, digits: int) -> list[Child]:
    low, high = max(bar.low, axis.low), min(bar.high, axis.high)
    left, right = round(axis.px(low), 1), round(axis.px(high), 1)
    known = math.isfinite(bar.low) and math.isfinite(bar.high)
    interval = f" ({bar.low:.{digits}f} to {bar.high:.{digits}f})" if known else ""
    return [
        tag("text", bar.name, x=NAMES - 12, y=y + 3.5, text_anchor="end"),
        tag("line", x1=left, x2=right, y1=y, y2=y, stroke=bar.color, stroke_width=2.5 if known else 0.6),
        tag("circle", cx=round(axis.px(bar.mean), 1), cy=y, r=3.6, fill=bar.color),
        tag("text", f"{bar.mean:.{digits}f}{interval}", x=WIDTH - _RIGHT + 8, y=y + 3.5),
    ]
