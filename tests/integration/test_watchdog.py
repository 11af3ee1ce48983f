"""A rank that no longer gets on: all ranks end with status 7 in bounded time, and their logs say where each was.

Each test starts a launcher with two ranks, some twenty seconds each.
"""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from test_faults import LONG, finish, gone, ranks_of, start, wait_for_checkpoint
from training_run import tiny_run

from unicom_dist.train.launch import log_path
from unicom_dist.train.watchdog import Watchdog

STALL_S = 6
LATER_S = 3.5  # rank 0 begins the step that rank 1 does not end so much later, as after a long checkpoint
SLEEPER = f"""
import os, sys, threading, time

def fall_asleep():
    while "unicom_dist.train.loop" not in sys.modules or not hasattr(sys.modules["unicom_dist.train.loop"], "Observer"):
        time.sleep(0.01)
    while not hasattr(sys.modules["unicom_dist.train.loop"], "train_step"):
        time.sleep(0.01)
    observer, ema = sys.modules["unicom_dist.train.loop"].Observer, sys.modules["unicom_dist.train.ema"].Ema
    between_steps, update = observer.between_steps, ema.update
    def late(self):
        between_steps(self)
        if self.run.step == 52:
            time.sleep({LATER_S})
    def sleeping_update(self):
        update(self)
        if self.updates == 53:
            time.sleep(10000)
    if os.environ["RANK"] == "0":
        observer.between_steps = late
    else:
        ema.update = sleeping_update

if "RANK" in os.environ:
    threading.Thread(target=fall_asleep, daemon=True).start()
"""


@pytest.mark.dist
@pytest.mark.parametrize("how", ["asleep", "stopped"])
def test_a_rank_that_does_not_get_on_ends_the_run_and_every_rank_says_where_it_was(tmp_path, monkeypatch, how):
    if how == "asleep":
        (tmp_path / "sitecustomize.py").write_text(SLEEPER)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    overrides = {"stages": LONG, "parallel": {"nproc": 2, "zero_stage": 0, "stall_s": STALL_S}}
    config = tiny_run(tmp_path, **overrides)
    process = start(tmp_path, **overrides)
    wait_for_checkpoint(config, process)
    ranks = ranks_of(process)
    if how == "stopped":
        os.kill(ranks[1], signal.SIGSTOP)
    began = time.monotonic()
    code, out = finish(process)
    assert code == 7, out
    assert how == "asleep" or time.monotonic() - began < STALL_S + 15  # also on a busy machine
    assert f"a step did not end within {STALL_S} s" in out
    assert "rank 0 was at: " in out
    assert "Traceback" not in out
    assert all(gone(pid) for pid in ranks)
    first, second = (log_path(Path(config.run_dir), rank).read_text() for rank in (0, 1))
    assert "train_step" in first  # the stack
    assert "gloo:all_reduce" in first  # the last collective
    assert ("sleeping_update" if how == "asleep" else "most recent call first") in second
    if how == "asleep":
        assert "rank 0 was at: sum of the losses over all ranks; rank 1 was at: optimizer step" in out


@pytest.fixture
def left(monkeypatch):
    """The statuses with which watchdogs would have ended this process; each ends its own thread instead."""
    statuses: list[int] = []

    def leave(status: int) -> None:
        statuses.append(status)
        raise SystemExit

    monkeypatch.setattr("unicom_dist.train.watchdog.LOOK_S", 0.01)
    monkeypatch.setattr("unicom_dist.train.watchdog.LINGER_S", 0.0)
    monkeypatch.setattr("os._exit", leave)
    return statuses


def wait_for(statuses: list[int]) -> list[int]:
    deadline = time.monotonic() + 60
    while not statuses and time.monotonic() < deadline:
        time.sleep(0.01)
    return statuses


def test_a_watchdog_that_is_fed_sleeps(left):
    with Watchdog(2.0) as dog:
        for _ in range(30):
            with dog.watching():
                time.sleep(0.05)
        time.sleep(2.1)  # between steps nothing is expected
    assert not left


def test_a_watchdog_that_hears_of_another_ranks_hang_ends_its_rank_at_once(left):
    said, elsewhere = [], threading.Event()
    with Watchdog(1000, said.append, elsewhere) as dog:
        dog.doing("writing a", "checkpoint")
        time.sleep(0.1)
        assert not left
        elsewhere.set()
        assert wait_for(left) == [7]
    assert "was at: writing a checkpoint" in said[0].why


def test_the_first_step_may_take_longer(left):
    with Watchdog(1.0) as dog:
        with dog.watching(first=True):
            time.sleep(1.5)
        assert not left
        with dog.watching():
            assert wait_for(left) == [7]
