"""The mixture follows its shares at every moment and can be continued. 1 process, 1 s."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unicom_dist.data.mixture import MixtureSchedule

WEIGHTS = st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 10), min_size=1)


@given(WEIGHTS, st.integers(1, 300))
def test_counts_stay_next_to_the_shares(weights: dict[str, float], draws: int) -> None:
    schedule = MixtureSchedule(weights)
    for drawn in range(1, draws + 1):
        schedule.draw()
        for task, share in schedule.shares.items():
            assert abs(schedule.counts[task] - share * drawn) < 1.5


def test_a_cycle_of_whole_shares_is_exact() -> None:
    schedule = MixtureSchedule({"text": 1, "t2i": 2, "i2t": 1})
    drawn = [schedule.draw() for _ in range(400)]
    assert {task: drawn.count(task) for task in schedule.shares} == {"text": 100, "t2i": 200, "i2t": 100}
    assert all(sorted(drawn[at : at + 4]) == ["i2t", "t2i", "t2i", "text"] for at in range(0, 400, 4))


@given(WEIGHTS, st.integers(0, 60))
def test_counts_are_the_whole_state(weights: dict[str, float], cut: int) -> None:
    first, second = MixtureSchedule(weights), MixtureSchedule(weights)
    for _ in range(cut):
        first.draw()
    second.counts = dict(first.counts)
    assert [first.draw() for _ in range(40)] == [second.draw() for _ in range(40)]


def test_a_task_of_weight_zero_is_never_drawn() -> None:
    assert {MixtureSchedule({"a": 0, "b": 1}).draw() for _ in range(10)} == {"b"}
    with pytest.raises(ValueError, match="must be positive"):
        MixtureSchedule({"a": 0})


def test_a_hundred_thousand_draws_are_within_one_of_their_shares() -> None:
    schedule = MixtureSchedule({"text": 0.3, "t2i": 1.7, "i2t": 0.9, "edit": 0.11, "interleaved": 1 / 3})
    for _ in range(100_000):
        schedule.draw()
    assert all(abs(schedule.counts[task] - share * 100_000) < 1 for task, share in schedule.shares.items())
