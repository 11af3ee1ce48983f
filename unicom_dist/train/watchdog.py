"""Finds a rank that no longer gets on, says where every rank stands, and ends the run with status 7.

The loop puts each step between `watching` and its end; a thread looks at the clock. As every step begins with a
collective of all ranks, a rank that sleeps, dies or is stopped holds up the steps of all others within one step, and
the watchdog of each finds it out by itself, without a message that might not get through. Python stacks, what the rank
was doing and torch's record of its last collectives then go to its log. The launcher, told of the first, asks the
others at once: their clocks may be behind, and the end of one rank breaks the connections of all (see `launch.py`).
"""

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from unicom_dist.config.errors import HangError

log = logging.getLogger(__name__)

FIRST_STEP = 3  # times as long: kernels are compiled, memory is allocated, connections are made
LOOK_S = 0.5  # between looks at the clock
LINGER_S = 3.0  # a rank's end breaks its connections: before that the others say where they are
COLLECTIVES = 8  # of the flight recorder's, in the log


class Watchdog:
    """A context manager around a rank's training. Without `stall_s` it only remembers what the rank is doing.

    `stalled(error)` is called from the watchdog's thread before the process ends; it should leave the error where the
    launcher, or a reader of the run's status, looks for it. `elsewhere` is set when another rank's watchdog has found
    something: this one then ends the process as well.
    """

    def __init__(
        self,
        stall_s: float = 0.0,
        stalled: Callable[[HangError], object] | None = None,
        elsewhere: threading.Event | None = None,
    ) -> None:
        self.stall_s, self._stalled, self._elsewhere = stall_s, stalled, elsewhere or threading.Event()
        self._what: tuple[Any, ...] = ("starting",)
        self._deadline = self._since = float("inf")
        self._limit = stall_s
        self._over = threading.Event()

    def __enter__(self) -> Self:
        if self.stall_s:
            threading.Thread(target=self._look, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def doing(self, *what: Any) -> None:
        """Remember what the rank does now, for the log (as cheap as can be)."""
        self._what = what

    @contextmanager
    def watching(self, first: bool = False) -> Iterator[None]:
        """A step: it must end within `stall_s`, the first of a stage within FIRST_STEP times that."""
        self._since = time.monotonic()
        self._limit = self.stall_s * (FIRST_STEP if first else 1)
        self._deadline = self._since + self._limit
        try:
            yield
        finally:
            self._deadline = float("inf")

    def _look(self) -> None:
        while not self._over.wait(LOOK_S):
            if time.monotonic() > self._deadline or self._elsewhere.is_set():
                self._end()

    def _end(self) -> None:
        what = " ".join(str(part) for part in self._what)
        error = HangError(
            f"a step did not end within {self._limit:g} s",
            f"{rank_name()} was at: {what}",
            "the stacks of all ranks are in their logs; run the same command again to continue from the last"
            " checkpoint, or raise parallel.stall_s if steps take that long",
            "docs/parallelism.md#a-rank-that-hangs",
        )
        try:
            print(f"watchdog: {error.what}; {error.why}", file=sys.stderr)
            report_stacks()
            if self._stalled:
                self._stalled(error)
            time.sleep(LINGER_S)
        finally:
            sys.stderr.flush()
            os._exit(HangError.exit_code)


def rank_name() -> str:
    """ "rank 3", from the launcher's or torchrun's environment."""
    return f"rank {os.environ.get('RANK', os.environ.get('SLURM_PROCID', '0'))}"


def report_stacks() -> None:
    """Every thread's Python stack and the last collectives, to standard error."""
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    for line in last_collectives():
        print(f"watchdog: {line}", file=sys.stderr)


def last_collectives() -> list[str]:
    """A line per entry of torch's flight recorder, newest last; empty where it does not record (gloo alone)."""
    try:
        from torch._C import _distributed_c10d as c10d

        record = json.loads(c10d._dump_fr_trace_json())  # type: ignore[attr-defined]
    except (ImportError, AttributeError, RuntimeError, ValueError):
        return []
    lines = []
    for entry in record.get("entries", [])[-COLLECTIVES:]:
        sizes = f"{entry.get('input_sizes')} -> {entry.get('output_sizes')}"
        group = (entry.get("process_group") or ["?"])[-1]
        lines.append(f"{entry.get('profiling_name')} {entry.get('state')} group {group} {sizes}")
    return lines
