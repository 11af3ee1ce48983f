"""Which elements two fragments of one tensor share, as few rectangles: the whole of resharding.

A cut along dimension k is a rectangle of columns in the matrix [prod(shape[:k]), prod(shape[k:])] of the whole tensor;
a cut along dimension 0 (and a whole tensor) is a range of rows of any such matrix as well, because its elements are
consecutive. A fragment is a range of the rectangle's elements in reading order, hence at most three rectangles: the
rest of a row, whole rows, the beginning of a row. Two fragments share the intersections of theirs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from unicom_dist.parallel.engine import Fragment


@dataclass(frozen=True)
class Shared:
    """`rows` x `columns` elements: from `source` on, `source_pitch` apart, and likewise in the target fragment."""

    rows: int
    columns: int
    source: int
    source_pitch: int
    target: int
    target_pitch: int

    @property
    def numel(self) -> int:
        """Elements."""
        return self.rows * self.columns

    @property
    def consecutive(self) -> bool:
        """Whether the elements follow one another on both sides."""
        return self.rows == 1 or self.columns == self.source_pitch == self.target_pitch


@dataclass(frozen=True)
class _Rectangle:
    row: int
    rows: int
    column: int
    columns: int
    at: int  # of its first element in the fragment
    pitch: int  # elements of the fragment from one of its rows to the next


def shared(source: Fragment, target: Fragment) -> list[Shared]:
    """The elements that two fragments of the same tensor have in common.

    ValueError when they are cut along two different dimensions, neither of which is the first.
    """
    inner = {dim for dim in (_dim(source), _dim(target)) if dim}
    if len(inner) > 1:
        raise ValueError(f"{source.name} is cut along dimensions {sorted(inner)}")
    if not inner:  # ranges of the whole tensor
        first, second = _start(source), _start(target)
        low = max(first, second)
        count = min(first + source.numel, second + target.numel) - low
        return [Shared(1, count, low - first, count, low - second, count)] if count > 0 else []
    dim = inner.pop()
    found = []
    for a, b in product(_rectangles(source, dim), _rectangles(target, dim)):
        row, column = max(a.row, b.row), max(a.column, b.column)
        rows = min(a.row + a.rows, b.row + b.rows) - row
        columns = min(a.column + a.columns, b.column + b.columns) - column
        if rows > 0 and columns > 0:
            ours, theirs = (r.at + (row - r.row) * r.pitch + column - r.column for r in (a, b))
            found.append(Shared(rows, columns, ours, a.pitch, theirs, b.pitch))
    return found


def _dim(fragment: Fragment) -> int:
    """Dimension of the cut; 0 where the elements are consecutive in the whole tensor."""
    piece = fragment.piece
    return 0 if piece.cut == piece.shape else piece.dim


def _start(fragment: Fragment) -> int:
    """Where a fragment of consecutive elements begins in the whole tensor."""
    piece = fragment.piece
    return (piece.begin * math.prod(piece.shape[1:]) if piece.cut != piece.shape else 0) + fragment.offset


def _rectangles(fragment: Fragment, dim: int) -> Iterator[_Rectangle]:
    """The rectangles of a fragment in the matrix of `dim`, which is 1 or more."""
    piece = fragment.piece
    if _dim(fragment) == dim:
        inner = math.prod(piece.shape[dim + 1 :])
        first, width, low = piece.begin * inner, piece.length * inner, fragment.offset
    else:
        first, width, low = 0, math.prod(piece.shape[dim:]), _start(fragment)
    at, high = 0, low + fragment.numel
    while low < high:
        row, column = divmod(low, width)
        if column or high - low < width:  # part of a row
            rows, columns = 1, min(width - column, high - low)
        else:
            rows, columns = (high - low) // width, width
        yield _Rectangle(row, rows, first + column, columns, at, width)
        low, at = low + rows * columns, at + rows * columns
