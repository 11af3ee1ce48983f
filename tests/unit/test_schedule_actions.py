"""Pipeline schedules for many sizes: complete, executable, holding no more and idling no longer than in theory."""

import itertools
from collections import Counter

import pytest

from unicom_dist.config.errors import ConfigError
from unicom_dist.parallel.pipeline.messages import Receive, Send, message_from, program
from unicom_dist.parallel.pipeline.schedule import Action, Actions, build
from unicom_dist.parallel.pipeline.simulate import Costs, best_efficiency, in_flight, simulate, timeline

grid = pytest.mark.parametrize(
    ("name", "ranks"), list(itertools.product(("gpipe", "1f1b", "interleaved", "zero-bubble"), range(1, 5)))
)


def sizes(name: str) -> list[tuple[int, int]]:
    """(micro-batches, chunks)."""
    return list(itertools.product(range(1, 10), range(1, 4) if name == "interleaved" else [1]))


def run(instructions: list[list[object]]) -> list[int]:
    """Execute programs whose sends need a posted buffer and deliver in order; how far each rank came."""
    posted: dict[tuple[int, int], list[Action]] = {}
    sent: dict[tuple[int, int], list[Action]] = {}
    done = [0] * len(instructions)
    progress = True
    while progress:
        progress = False
        for rank, mine in enumerate(instructions):
            while done[rank] < len(mine):
                step = mine[done[rank]]
                if isinstance(step, Receive):
                    posted.setdefault((step.message.source, rank), []).append(step.message.action)
                elif isinstance(step, Send):
                    sent.setdefault((rank, step.message.target), []).append(step.message.action)
                elif not arrived(step, rank, posted, sent):
                    break
                done[rank] += 1
                progress = True
    return done


def arrived(action: Action, rank: int, posted: dict, sent: dict) -> bool:
    """Whether the n-th buffer posted is the one this action waits for, and the n-th tensor sent is in it."""
    for (source, target), buffers in posted.items():
        if target == rank and action in buffers:
            n = buffers.index(action)
            transfers = sent.get((source, target), [])
            assert transfers[: n + 1] == buffers[: len(transfers[: n + 1])], "the ends of a channel disagree"
            return len(transfers) > n
    return True


@grid
def test_every_action_occurs_once(name, ranks):
    for micros, chunks in sizes(name):
        kinds = "FBW" if name == "zero-bubble" else "FB"
        expected = Counter(Action(k, c, i) for k in kinds for c in range(chunks) for i in range(micros))
        assert all(Counter(mine) == expected for mine in build(name, ranks, micros, chunks))


@grid
def test_programs_run_to_their_end_with_matching_sends_and_receives(name, ranks):
    for micros, chunks in sizes(name):
        actions = build(name, ranks, micros, chunks)
        programs = program(actions)
        assert run(programs) == [len(mine) for mine in programs]
        for rank, mine in enumerate(programs):
            assert [step for step in mine if isinstance(step, Action)] == actions[rank]
            needed = {step.message.action for step in mine if isinstance(step, Receive)}
            made = [m for other in range(ranks) for a in actions[other] if (m := message_from(a, other, ranks, chunks))]
            assert needed == {m.action for m in made if m.target == rank != m.source}


@grid
def test_buffers_are_posted_one_message_early(name, ranks):
    for micros, chunks in sizes(name):
        for mine in program(build(name, ranks, micros, chunks)):
            channels: dict[int, list[Action]] = {}
            for step in mine:
                if isinstance(step, Receive):
                    channels.setdefault(step.message.source, []).append(step.message.action)
            posted = set()
            for step in mine:
                if isinstance(step, Receive):
                    posted.add(step.message.action)
                for messages in channels.values():
                    if step in messages[:-1]:
                        assert messages[messages.index(step) + 1] in posted


@grid
def test_no_rank_holds_more_than_theory_says(name, ranks):
    for micros, chunks in sizes(name):
        held = [in_flight(mine) for mine in build(name, ranks, micros, chunks)]
        if name == "gpipe":
            assert held == [micros] * ranks
        elif name == "1f1b":
            assert held == [min(micros, ranks - rank) for rank in range(ranks)]
        elif name == "zero-bubble":
            assert max(held) <= min(micros, ranks)
        else:
            largest = -(-micros // max(1, micros // ranks))
            ahead = [(chunks - 1) * largest + 2 * (ranks - 1 - rank) + 1 for rank in range(ranks)]
            assert held == [min(chunks * micros, n) for n in ahead]
            if micros % ranks == 0 and micros > ranks:  # in whole micro-batches: p (1 + (p - 1) / (p v))
                assert held[0] / chunks == pytest.approx(ranks * (1 + (ranks - 1) / (ranks * chunks)))


@grid
def test_makespan_is_the_closed_form(name, ranks):
    for micros, chunks in sizes(name):
        actions = build(name, ranks, micros, chunks)
        work = 3 * chunks * micros  # F = 1, B = 2, or B = W = 1
        makespan = simulate(actions).makespan
        if name in ("gpipe", "1f1b"):
            assert makespan == work + 3 * (ranks - 1)
        elif micros < ranks:
            assert work < makespan or ranks == 1
        elif name == "interleaved":
            assert makespan == work + 3 * (ranks - 1)
            assert simulate(actions).efficiency == pytest.approx(best_efficiency(ranks, micros, chunks))
        else:
            assert makespan == work + (ranks - 1)


def test_zero_bubble_idles_for_forward_and_input_gradient_less_the_weight_gradient():
    simulation = simulate(build("zero-bubble", 4, 12), Costs.equal(4, forward=10, backward=20, weight=8))
    assert simulation.makespan == pytest.approx(12 * 30 + 3 * (10 + 12 - 8))


def test_messages_cost_what_the_critical_path_holds():
    costs = Costs.equal(4, message=0.5)
    assert simulate(build("gpipe", 4, 1), costs).makespan == 4 * 3 + 6 * 0.5
    assert simulate(build("1f1b", 1, 5), Costs.equal(1, message=0.5)).makespan == 15


def test_the_slowest_pp_stage_sets_the_pace():
    costs = Costs([1, 1, 2, 1], [2, 2, 4, 2], [1] * 4)
    simulation = simulate(build("1f1b", 4, 20), costs)
    # Filled after 2, waits 1 for the first gradient, drained after 4 more.
    assert simulation.makespan == pytest.approx(20 * 6 + 2 + 1 + 4)
    assert min(range(4), key=simulation.idle.__getitem__) == 2


def test_a_schedule_that_cannot_be_executed_is_named():
    backwards: Actions = [[Action("B", 0, 0), Action("F", 0, 0)], [Action("F", 0, 0), Action("B", 0, 0)]]
    with pytest.raises(ValueError, match=r"deadlocks.*0: 'B0.0', 1: 'F0.0'"):
        simulate(backwards)
    assert run(program(backwards)) == [1, 1]  # both have posted a buffer and wait


def test_timeline_shows_every_rank():
    assert timeline(build("1f1b", 2, 2)).splitlines() == [
        "rank 0  F0 F1 ·  ·  B0─── ·  B1───",
        "rank 1  ·  F0 B0─── F1 B1─── ·  ·",
    ]
    assert "F0'" in timeline(build("interleaved", 2, 2, 2))


def test_forward_passes_alone():
    for ranks, micros, chunks in itertools.product(range(1, 5), range(1, 10), range(1, 4)):
        actions = build("forward", ranks, micros, chunks)
        assert run(program(actions)) == [len(mine) for mine in program(actions)]
        assert all(Counter(a.kind for a in mine) == {"F": micros * chunks} for mine in actions)
        if micros >= ranks:
            assert simulate(actions).makespan == micros * chunks + ranks - 1


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("2f2b", 2, 2), "no such schedule"),
        (("1f1b", 2, 2, 2), "only the interleaved"),
        (("1f1b", 2, 0), "at least one micro-batch"),
    ],
)
def test_what_cannot_work_is_refused_with_what_would(arguments, why):
    with pytest.raises(ConfigError) as error:
        build(*arguments)
    assert why in error.value.why
    assert error.value.remedy
    assert error.value.docs
