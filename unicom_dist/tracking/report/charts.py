"""Line charts as inline SVG: a faint line for what was measured, a strong one for its running mean, dots for held-out.

Axes choose themselves: logarithmic when a positive quantity spans more than a factor of five, else linear. The page's
script reads values back from the coordinates for its tooltips, so the data are in the page once.
"""

import math
from dataclasses import dataclass, replace

from unicom_dist.tracking.report.data import Points
from unicom_dist.tracking.report.html import Child, Markup, tag

WIDTH, HEIGHT = 300, 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 38, 8, 8, 22
_MAX_POINTS = 240


@dataclass(frozen=True)
class Line:
    """One line of a chart; `dots` draws its points (sparse, held-out), `exact` takes no running mean."""

    label: str
    points: Points
    color: str
    dots: bool = False
    exact: bool = False

    @property
    def shown(self) -> Points:
        """The points of the strong line."""
        return self.points if self.dots or self.exact else smooth(self.points)


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels."""

    low: float
    high: float
    start_px: float
    end_px: float
    log: bool = False

    def px(self, value: float) -> float:
        """Position of `value`."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start_px + (value - low) / (high - low) * (self.end_px - self.start_px)


def chart(
    title: str, lines: list[Line], unit: str = "", may_be_log: bool = True, labels: bool = False
) -> Markup | None:
    """The chart of `lines` over steps, or None when none of them has a finite point.

    Above it stand the last values of up to four lines, or with `labels` the lines' names.
    """
    lines = [replace(line, points=[p for p in line.points if math.isfinite(p[1])]) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    drawn = [(line, _thin(line.shown)) for line in lines]
    x_axis, y_axis = _axes(lines, [points for _, points in drawn], may_be_log)
    marks: list[Child] = [_frame(x_axis, y_axis)]
    for line in lines:
        if len(line.points) >= 40 and not (line.dots or line.exact):
            raw = _path(_thin(line.points), x_axis, y_axis)
            marks.append(tag("polyline", points=raw, stroke=line.color, class_="raw"))
    for line, points in drawn:
        path = _path(points, x_axis, y_axis)
        dash = "4 3" if line.dots else None
        marks.append(
            tag("polyline", points=path, stroke=line.color, stroke_dasharray=dash, class_="line", data_label=line.label)
        )
        if line.dots or len(points) == 1:
            marks.extend(_dot(x_axis.px(x), y_axis.px(y), line.color) for x, y in points[:60])
    marks.append(tag("line", class_="cursor", x1=0, x2=0, y1=_TOP, y2=HEIGHT - _BOTTOM))
    svg = tag(
        "svg",
        *marks,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title}: {', '.join(line.label for line in lines)} over steps",
        data_x=f"{x_axis.low} {x_axis.high} {x_axis.start_px} {x_axis.end_px}",
        data_y=f"{y_axis.low} {y_axis.high} {y_axis.start_px} {y_axis.end_px} {int(y_axis.log)}",
    )
    ends = [
        tag(
            "span",
            tag("i", style=f"background:{line.color}"),
            line.label if labels else number(line.shown[-1][1]),
            title=f"{line.label}, last value",
        )
        for line in lines
        if labels or len(lines) <= 4
    ]
    note = ", ".join(part for part in (unit, "log" if y_axis.log else "") if part)
    caption = tag("figcaption", tag("b", title), tag("span", note, class_="unit"), tag("span", *ends, class_="ends"))
    return tag("figure", caption, svg, class_="chart")


def smooth(points: Points) -> Points:
    """Centred running mean over about a twentieth of the points, narrow at the start, where curves are steep."""
    most = len(points) // 40
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    result = []
    for i, (x, _) in enumerate(points):
        half = min(most, i)
        end = min(i + half + 1, len(points))
        result.append((x, (sums[end] - sums[i - half]) / (end - i + half)))
    return result


def number(value: float) -> str:
    """Four significant digits without a useless exponent: 0.0312, 12.5, 3.1e-05, 45.7k."""
    size = abs(value)
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / {'G': 1e9, 'M': 1e6, 'k': 1e3}[suffix]:.4g}{suffix}"
    return f"{value:.2e}" if size < 1e-3 else f"{value:.4g}"


def _thin(points: Points) -> Points:
    """At most about _MAX_POINTS points: of every bucket its lowest and highest, so that spikes stay visible."""
    if len(points) <= _MAX_POINTS:
        return points
    size = math.ceil(2 * len(points) / _MAX_POINTS)
    kept = [points[0]]
    for start in range(1, len(points) - 1, size):
        bucket = points[start : min(start + size, len(points) - 1)]
        ends = {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
        kept.extend(sorted(ends))
    return [*kept, points[-1]]


def _axes(lines: list[Line], drawn: list[Points], may_be_log: bool) -> tuple[Axis, Axis]:
    steps = [x for line in lines for x, _ in line.points]
    shown = [y for points in drawn for _, y in points]
    raw = sorted(y for line in lines for _, y in line.points)
    # The faint line may leave the frame at its rarest spikes; the running means and the dots may not.
    inner = raw[len(raw) // 200 : len(raw) - len(raw) // 200]
    low, high = min(*shown, inner[0]), max(*shown, inner[-1])
    log = may_be_log and low > 0 and high / low > 5
    if log:
        pad = (high / low) ** 0.04
        low, high = low / pad, high * pad
    else:
        pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = (0.0 if 0 <= low < 0.25 * high else low - pad), high + pad
    first, last = min(steps), max(steps)
    first = 0 if first < 0.2 * last else first
    x_axis = Axis(first, last if last > first else first + 1, _LEFT, WIDTH - _RIGHT)
    return x_axis, Axis(low, high, HEIGHT - _BOTTOM, _TOP, log)


def _frame(x_axis: Axis, y_axis: Axis) -> Markup:
    parts: list[Child] = []
    for value in ticks(y_axis, 5):
        y = round(y_axis.px(value), 1)
        parts.append(tag("line", class_="grid", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y))
        parts.append(tag("text", number(value), x=_LEFT - 5, y=y + 3.5, text_anchor="end"))
    bottom = HEIGHT - _BOTTOM
    parts.append(tag("line", class_="axis", x1=_LEFT, x2=WIDTH - _RIGHT, y1=bottom, y2=bottom))
    for value in ticks(x_axis, 5):
        x = round(x_axis.px(value), 1)
        parts.append(tag("line", class_="axis", x1=x, x2=x, y1=bottom, y2=bottom + 4))
        parts.append(tag("text", number(value), x=x, y=bottom + 15, text_anchor="middle"))
    return tag("g", *parts)


def ticks(axis: Axis, count: int) -> list[float]:
    """Round values on an axis, about `count` at most."""
    if axis.log:
        decades = math.log10(axis.high / axis.low)
        steps = (1.0,) if decades > 4 else (1.0, 3.0) if decades > 2 else (1.0, 2.0, 5.0)
        first, last = math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high))
        return [v for e in range(first, last + 1) for s in steps if axis.low <= (v := s * 10.0**e) <= axis.high]
    span = axis.high - axis.low
    rough = 10.0 ** math.floor(math.log10(span / count))
    step = next(rough * m for m in (1, 2, 5, 10) if span / (rough * m) <= count)
    ticks = range(math.ceil(axis.low / step), math.floor(axis.high / step) + 1)
    return [round(k * step, 12) for k in ticks]


def _path(points: Points, x_axis: Axis, y_axis: Axis) -> str:
    pairs = []
    for x, y in points:
        clamped = min(max(y, y_axis.low), y_axis.high)
        pairs.append(f"{x_axis.px(x):.1f},{y_axis.px(clamped):.2f}")
    return " ".join(pairs)


def _dot(x: float, y: float, color: str) -> Markup:
    return tag("circle", cx=round(x, 1), cy=round(y, 1), r=2.2, fill=color)
