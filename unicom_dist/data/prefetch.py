"""Steps prepared ahead of the trainer by one thread, with the position to resume from after each.

A loader plans a step (what is in it, for all ranks), then builds the share of its own rank. Both happen in the thread;
the state handed out is that after the last step the trainer *received*, however far the thread has run ahead.
"""

import contextlib
import logging
import queue
import threading
from abc import ABC, abstractmethod
from typing import Any, Generic, NamedTuple, Self, TypeVar

from unicom_dist.config.errors import DataError

log = logging.getLogger(__name__)
Batch = TypeVar("Batch")
State = dict[str, Any]
_POLL_S = 0.2


class _Ready(NamedTuple):
    batches: list[Any]
    state: State
    error: BaseException | None


class StepLoader(ABC, Generic[Batch]):
    """`next_step()` gives this rank's micro-batches; `state_dict()` is the position after it, of constant size."""

    def __init__(self, prefetch: int) -> None:
        self._queue: queue.Queue[_Ready] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._state: State | None = None

    @abstractmethod
    def _next(self) -> list[Batch]:
        """Advance by one step and build this rank's micro-batches."""

    @abstractmethod
    def _snapshot(self) -> State:
        """The position after the steps built so far, as plain JSON values."""

    @abstractmethod
    def _restore(self, state: State) -> None:
        """Continue from a snapshot. DataError if it belongs to other data or another stage."""

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next step. Raises what went wrong while preparing them."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="data", daemon=True)
            self._thread.start()
        ready = self._queue.get()
        if ready.error is not None:
            self.close()
            raise ready.error
        self._state = ready.state
        return ready.batches

    def state_dict(self) -> State:
        """The position after the last step received; the same on every rank and for any number of ranks."""
        return self._snapshot() if self._state is None else self._state

    def load_state_dict(self, state: State) -> None:
        """Continue after the step at which `state` was taken."""
        self.close()
        self._restore(state)
        self._state = self._snapshot()

    def close(self) -> None:
        """Stop the thread and drop what it prepared; the next `next_step` prepares it again."""
        if self._thread is not None:
            self._stop.set()
            with contextlib.suppress(queue.Empty):
                self._queue.get_nowait()  # wakes a thread that waits for room
            self._thread.join()
            self._thread = None
            self._stop.clear()
            self._queue = queue.Queue(maxsize=self._queue.maxsize)
            if self._state is not None:
                self._restore(self._state)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                ready = _Ready(self._next(), self._snapshot(), None)
            except BaseException as error:  # handed to the trainer's thread, which raises it
                ready = _Ready([], {}, error)
            while not self._stop.is_set():
                try:
                    self._queue.put(ready, timeout=_POLL_S)
                    break
                except queue.Full:
                    continue
            if ready.error is not None:
                return


class BadSamples:
    """Counts and names malformed samples; too many of them end the run.

    The share is taken over what was looked at, but at least over `min(total, 1000)` samples, so that one bad sample at
    the start of a run is not 100 %.
    """

    def __init__(self, total: int, max_fraction: float) -> None:
        self.names: dict[str, str] = {}
        self._looked_at, self._in_a_row = 0, 0
        self._total = total
        self._max_fraction = max_fraction

    def accept(self) -> None:
        """Count a sample that is in order."""
        self._looked_at += 1
        self._in_a_row = 0

    def report(self, name: str, error: DataError) -> None:
        """Record a skipped sample. DataError when their share exceeds `data.max_bad_fraction`."""
        self._looked_at += 1
        self._in_a_row += 1
        if name not in self.names:
            log.warning("skipped sample %s: %s", name, str(error).replace("\n", " "))
        self.names[name] = error.what
        of = max(self._looked_at, min(self._total, 1000))
        if len(self.names) > self._max_fraction * of or self._in_a_row > self._total:
            raise DataError(
                f"{len(self.names)} of {of} samples are malformed, the last is {name}: {error.what}",
                f"data.max_bad_fraction = {self._max_fraction} allows fewer",
                "run `unicom data check` and repair the shards, or raise data.max_bad_fraction",
                "docs/data.md",
            )
