"""The line of a training stage: loss per modality, tokens/s, latents/s, MFU, data wait and the time that is left.

A progress bar with the figures under it on a terminal, one plain line per update elsewhere (log files, CI). Only rank 0
makes one. `values` carries the names listed in `metrics.py`; what is missing is not shown.
"""

import time
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text


class StageConsole:
    """Shows one stage's progress. A context manager; `update` may be called every step, with or without values."""

    def __init__(
        self,
        stage: str,
        total_steps: int,
        *,
        start_step: int = 0,
        position: str = "",
        console: Console | None = None,
        min_interval_s: float = 5.0,
    ) -> None:
        """`position` is shown behind the name, e.g. "2/6"; plain lines are at least `min_interval_s` seconds apart."""
        self._console = console or Console()
        self._name = f"{stage} {position}".strip()
        self._total = total_steps
        self._min_interval_s = min_interval_s
        self._eta = Eta(start_step, total_steps)
        self._last_line_s = -float("inf")
        self._started_s = time.monotonic()
        self._figures = ""
        self._start_step = self._step = start_step
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("ETA {task.fields[eta]}", markup=False),
            expand=True,
            console=self._console,
        )
        self._task = self._bar.add_task(self._name, total=total_steps, completed=start_step, eta="-")
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> "StageConsole":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, step: int, values: Mapping[str, float] | None = None) -> None:
        """`step` optimizer steps are finished; `values` are this interval's figures (kept on screen until the next)."""
        self._step = step
        self._eta.update(step)
        if values:
            self._figures = format_values(values)
        if self._live:
            return
        now = time.monotonic()
        if values and (now - self._last_line_s >= self._min_interval_s or step >= self._total):
            self._last_line_s = now
            eta = f"ETA {format_duration(self._eta.remaining_s)}"
            self._print("  ".join((self._name, f"{step}/{self._total}", self._figures, eta)))

    def note(self, text: str) -> None:
        """A line of its own that stays: an evaluation, a picture grid, a checkpoint."""
        self._print(f"  {text}")

    def close(self) -> None:
        """Take the bar away and leave one line that sums the stage up."""
        if self._live:
            self._live.stop()
            self._print(f"{self._name}  {self._step}/{self._total}  {self._figures}")
        steps, took_s = self._step - self._start_step, time.monotonic() - self._started_s
        self._print(f"  {steps} steps in {format_duration(took_s)}")

    def _render(self) -> Group:
        self._bar.update(self._task, completed=self._step, eta=format_duration(self._eta.remaining_s))
        return Group(self._bar.get_renderable(), Text(f"  {self._figures}", style="dim", overflow="fold"))

    def _print(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


class Eta:
    """Seconds left, from a running mean of the seconds per step (evaluations and checkpoints included)."""

    def __init__(self, start_step: int, total_steps: int, horizon: float = 50.0) -> None:
        """`horizon` is the number of steps the mean looks back over."""
        self._step, self._total, self._horizon = start_step, total_steps, horizon
        self._at_s = time.monotonic()
        self._step_s = 0.0
        self._weight = 0.0

    def update(self, step: int, now_s: float | None = None) -> None:
        """`step` steps are finished at `now_s` (monotonic clock)."""
        now = time.monotonic() if now_s is None else now_s
        steps = step - self._step
        if steps <= 0:
            return
        keep = (1.0 - 1.0 / self._horizon) ** steps
        self._step_s = keep * self._step_s + (1.0 - keep) * (now - self._at_s) / steps
        self._weight = keep * self._weight + (1.0 - keep)
        self._step, self._at_s = step, now

    @property
    def remaining_s(self) -> float:
        """nan before the first step is finished."""
        if self._weight == 0.0:
            return float("nan")
        return self._step_s / self._weight * max(self._total - self._step, 0)


def format_values(values: Mapping[str, float]) -> str:
    """The figures of a step in the order a reader looks for them; data wait is a share of the step's time."""
    parts = [
        f"{name.removeprefix('loss/')} {value:.4g}"
        for name, value in values.items()
        if name.startswith("loss/") and "@" not in name
    ]
    for name, unit in (("tokens_per_s", "tok/s"), ("latents_per_s", "lat/s"), ("images_per_s", "img/s")):
        if values.get(name):
            parts.append(f"{format_count(values[name])} {unit}")
    if values.get("mfu"):
        parts.append(f"MFU {100 * values['mfu']:.1f} %")
    if "data_wait_s" in values and values.get("step_s"):
        parts.append(f"data wait {100 * values['data_wait_s'] / values['step_s']:.0f} %")
    return "  ".join(parts)


def format_count(number: float) -> str:
    """1234567 -> "1.23M"; three significant digits."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def format_duration(seconds: float) -> str:
    """75 -> "1:15", 3675 -> "1:01:15", nan -> "-"."""
    if seconds != seconds or seconds == float("inf"):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
