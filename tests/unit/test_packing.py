"""Packing loses nothing, keeps the order, and can be continued. 1 process, 1 s."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unicom_dist.data.packing import Packer

ROW = 32


@dataclass(frozen=True)
class Item:
    number: int
    length: int


ITEMS = st.lists(st.integers(1, ROW), max_size=120).map(lambda ls: [Item(n, length) for n, length in enumerate(ls)])


def pack(items: list[Item], packer: Packer[Item]) -> list[list[Item]]:
    return [row for item in items if (row := packer.add(item)) is not None]


@given(ITEMS, st.integers(1, 8))
def test_every_sample_is_in_one_row_and_rows_fit(items: list[Item], max_open: int) -> None:
    packer: Packer[Item] = Packer(ROW, max_open)
    rows = pack(items, packer) + packer.open
    assert sorted(item.number for row in rows for item in row) == list(range(len(items)))
    assert all(sum(item.length for item in row) <= ROW for row in rows)
    assert len(packer.open) <= max_open


@given(ITEMS, st.integers(1, 8))
def test_order_is_kept_within_and_between_rows(items: list[Item], max_open: int) -> None:
    packer: Packer[Item] = Packer(ROW, max_open)
    rows = pack(items, packer) + packer.open
    assert all(row == sorted(row, key=lambda item: item.number) for row in rows)
    firsts = [row[0].number for row in rows]
    assert firsts == sorted(firsts)


@given(ITEMS, st.integers(0, 120))
def test_continuing_from_the_open_rows_gives_the_same_rows(items: list[Item], cut: int) -> None:
    whole: Packer[Item] = Packer(ROW)
    expected = pack(items, whole)
    first: Packer[Item] = Packer(ROW)
    rows = pack(items[:cut], first)
    second: Packer[Item] = Packer(ROW)
    second.restore(first.open)
    assert rows + pack(items[cut:], second) == expected
    assert second.open == whole.open


def test_a_sample_goes_to_the_fullest_row_that_has_room() -> None:
    packer: Packer[Item] = Packer(10)
    for number, length in enumerate([6, 7, 3, 4]):
        packer.add(Item(number, length))
    assert [[item.number for item in row] for row in packer.open] == [[0, 3], [1, 2]]


def test_small_samples_fill_rows_almost_whole() -> None:
    packer: Packer[Item] = Packer(1024)
    rows = pack([Item(n, 60 + n * 37 % 50) for n in range(2000)], packer)
    assert sum(item.length for row in rows for item in row) / (1024 * len(rows)) > 0.98


def test_a_sample_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Packer[Item](ROW).add(Item(0, ROW + 1))
