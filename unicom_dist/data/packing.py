"""Samples into rows of a fixed number of positions, without cutting, losing or reordering them.

A few rows are open at a time. A sample goes to the fullest open row that has room (best fit); if there is none, a new
row is opened, and once too many are open the oldest leaves. Rows leave in the order in which they were opened and
samples keep their order within a row, so the stream stays close to the mixture's. The open rows are carry-over state.
"""

from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Anything with a length in positions."""

    @property
    def length(self) -> int: ...


T = TypeVar("T", bound=Sized)


class Packer(Generic[T]):
    """Order-preserving best fit into rows of `row_positions` positions, at most `max_open` of them unfinished."""

    def __init__(self, row_positions: int, max_open: int = 8) -> None:
        self.row_positions, self.max_open = row_positions, max_open
        self.open: list[list[T]] = []
        self._left: list[int] = []

    def add(self, sample: T) -> list[T] | None:
        """Take in a sample; the row that this completed, if any. ValueError: longer than a row."""
        length = sample.length
        if length > self.row_positions:
            raise ValueError(f"{length} positions do not fit into a row of {self.row_positions}")
        room = [(left, n) for n, left in enumerate(self._left) if left >= length]
        if room:
            _, best = min(room)
            self.open[best].append(sample)
            self._left[best] -= length
            return None
        self.open.append([sample])
        self._left.append(self.row_positions - length)
        if len(self.open) <= self.max_open:
            return None
        self._left.pop(0)
        return self.open.pop(0)

    def restore(self, rows: list[list[T]]) -> None:
        """Continue with these open rows."""
        self.open = [list(row) for row in rows]
        self._left = [self.row_positions - sum(sample.length for sample in row) for row in rows]
