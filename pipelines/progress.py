"""Progress of a job: a bar with rate and time left on a terminal, a log line every few seconds elsewhere."""

import logging
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)
LINE_EVERY_S = 10.0


class JobProgress:
    """Counts `total` units of work. Use as a context manager; `start` units were done before."""

    def __init__(self, title: str, total: int, unit: str = "images", start: int = 0) -> None:
        self.title, self.total, self.unit = title, total, unit
        self._start = self.done = start
        self._began = self._said = time.monotonic()
        console = Console(file=sys.stderr)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
            )
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task(title, total=total, completed=start, rate="")

    @property
    def rate(self) -> float:
        """Units per second since the job began."""
        return (self.done - self._start) / max(time.monotonic() - self._began, 1e-9)

    def _rate(self) -> str:
        return f"{self.rate:.0f}" if self.rate >= 10 else f"{self.rate:.2g}"

    def update(self, done: int) -> None:
        """Tell how many units are done in all."""
        self.done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=f"{self._rate()} {self.unit}/s")
        elif time.monotonic() - self._said >= LINE_EVERY_S:
            self._said = time.monotonic()
            left = (self.total - done) / self.rate if self.rate > 0 else float("inf")
            eta = f"{left:.0f} s left" if left < 1e6 else "no estimate yet"
            log.info("%s: %d/%d %s, %s/s, %s", self.title, done, self.total, self.unit, self._rate(), eta)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
