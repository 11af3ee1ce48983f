"""Rows are dealt evenly, all of them, the same way everywhere. 1 process, 1 s."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unicom_dist.data.balance import deal, even_parts

COSTS = st.lists(st.integers(1, 10**15), min_size=24, max_size=24)


@given(COSTS, st.sampled_from([(1, 1), (1, 4), (2, 3), (4, 2), (8, 1), (24, 1)]))
def test_every_row_is_dealt_once_and_pieces_have_one_size(costs: list[int], shape: tuple[int, int]) -> None:
    ranks, micro_batches = shape
    dealt = deal(costs, ranks, micro_batches)
    pieces = [piece for rank in dealt for piece in rank]
    assert [len(rank) for rank in dealt] == [micro_batches] * ranks
    assert {len(piece) for piece in pieces} == {24 // (ranks * micro_batches)}
    assert sorted(row for piece in pieces for row in piece) == list(range(24))
    assert all(piece == sorted(piece) for piece in pieces)
    sums = [[sum(costs[row] for row in piece) for piece in rank] for rank in dealt]
    assert all(rank == sorted(rank, reverse=True) for rank in sums)


def test_one_piece_has_the_rows_in_their_order() -> None:
    assert deal([3, 1, 2], 1, 1) == [[[0, 1, 2]]]


@given(COSTS)
def test_no_single_exchange_with_the_costliest_part_helps(costs: list[int]) -> None:
    parts = even_parts(costs, 4)
    sums = [sum(costs[n] for n in part) for part in parts]
    top = sums.index(max(sums))
    for part, total in zip(parts, sums, strict=True):
        assert not any(0 < costs[a] - costs[b] < sums[top] - total for a in parts[top] for b in part)


def test_what_greedy_leaves_uneven_is_exchanged() -> None:
    """Greedy gives 8 + 5 + 5 to one part and 7 + 6 + 2 to the other."""
    parts = even_parts([8, 7, 6, 5, 5, 2], 2)
    assert sorted(sum([8, 7, 6, 5, 5, 2][n] for n in part) for part in parts) == [16, 17]


def test_rows_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(ValueError, match="3 items do not divide among 2 parts"):
        even_parts([1, 2, 3], 2)
