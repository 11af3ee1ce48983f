"""Steps prepared ahead of the trainer by one thread, with the position to resume from after each.

A loader plans a step (what is in it, for all ranks), then builds the share of its own rank. Both happen in the thread;
the state handed out is that after the last step the trainer *received*, however far the thread has run ahead.
"""

import contextlib
import logging
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, Self, TypeVar

from unicom_dist.config.errors import DataError

log = logging.getLogger(__name__)
Batch = TypeVar("Batch")
Item = TypeVar("Item")
State = dict[str, Any]
_POLL_S = 0.2


class _Ready(NamedTuple):
    batches: list[Any]
    state: State
    error: BaseException | None


class Share:
    """What one rank takes of a step of `total` samples or rows: `count` from number `first` on, in equal pieces.

    DataError unless all ranks and micro-batches get pieces of one size.
    """

    def __init__(self, total: int, dp_rank: int, dp_size: int, micro_batches: int) -> None:
        if total % (dp_size * micro_batches):
            raise DataError(
                f"batch = {total} does not divide among {dp_size} ranks x {micro_batches} micro-batches",
                "every rank takes equally many pieces of a step",
                f"use a multiple of {dp_size * micro_batches}",
            )
        self.total, self.rank, self.ranks, self.micro_batches = total, dp_rank, dp_size, micro_batches
        self.count = total // dp_size
        self.first, self._piece = dp_rank * self.count, self.count // micro_batches

    def cut(self, mine: Sequence[Item]) -> list[Sequence[Item]]:
        """This rank's `count` items, a piece per micro-batch."""
        return [mine[at : at + self._piece] for at in range(0, self.count, self._piece)]


class StepLoader(ABC, Generic[Batch]):
    """`next_step()` gives this rank's micro-batches; `state_dict()` is the position after it, of constant size.

    identity: what the order of the samples depends on; a position is taken up again only where it is the same.
    """

    def __init__(self, identity: Mapping[str, object], prefetch: int) -> None:
        self._identity = dict(identity)
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
        """Continue from a snapshot."""

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
        return {**self._identity, **(self._snapshot() if self._state is None else self._state)}

    def load_state_dict(self, state: State) -> None:
        """Continue after the step at which `state` was taken. DataError if that was in other data or another stage."""
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise DataError(
                    f"the saved data position has {name} = {state.get(name)!r}, this run has {value!r}",
                    "the order of the samples depends on it, so the position means nothing here",
                    "start the stage anew, or restore the configuration and data it was started with",
                    "docs/data.md",
                )
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
