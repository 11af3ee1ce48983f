"""Which error is shown when ranks fail, and the signals that ask for a stop. One process."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from unicom_dist.config.errors import DataError, HangError, PreflightError, UnicomError
from unicom_dist.parallel.mesh import environment
from unicom_dist.testing.tiny import tiny_config
from unicom_dist.train.launch import _cause, _watch, error_path, log_path, threads_per_rank
from unicom_dist.train.pipeline import preflight
from unicom_dist.train.signals import STOP_SIGNALS, StopRequest
from unicom_dist.train.worker import _report


def leave(run_dir, rank: int, kind: str, what: str, at: float, unexpected: bool = False) -> None:
    path = error_path(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"type": kind, "what": what, "why": "w", "remedy": "r", "docs": "", "time": at}
    path.write_text(json.dumps(record | {"unexpected": unexpected or kind == "UnicomError"}))


def test_a_killed_rank_is_named_before_the_errors_that_followed_from_it(tmp_path):
    leave(tmp_path, 0, "UnicomError", "connection closed by peer", 1.0)
    error = _cause([1, -signal.SIGKILL], tmp_path)
    assert isinstance(error, HangError)
    assert "rank 1 was ended by SIGKILL" in error.what


RANK = """
import faulthandler, signal, sys, time
faulthandler.register(signal.SIGUSR2)
def waits_for_the_other():
    print("ready", flush=True)
    time.sleep(60)
waits_for_the_other()
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_a_collective_that_took_too_long_has_the_other_ranks_write_their_stacks(tmp_path, stopped):
    """No watchdog has found a hang: the rank that waited in vain ends with status 7 and has no record of one."""
    leave(tmp_path, 0, "HangError", "a collective did not end", 1.0, unexpected=True)
    log = log_path(tmp_path, 1)
    with log.open("wb") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        waiting = subprocess.Popen([sys.executable, "-c", RANK], stderr=errors, **pipes)
    with waiting, subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"], stdin=subprocess.PIPE) as failed:
        assert waiting.stdout.readline() == b"ready\n"
        if stopped:
            waiting.send_signal(signal.SIGSTOP)
        failed.wait()
        with pytest.raises(HangError, match="a collective did not end"):
            _watch([failed, waiting], tmp_path, [])
        assert waiting.poll() == -signal.SIGTERM
    assert "in waits_for_the_other" in log.read_text()


def test_an_error_with_a_remedy_is_shown_before_a_vague_one(tmp_path):
    leave(tmp_path, 0, "UnicomError", "connection closed by peer", 1.0)
    leave(tmp_path, 1, "DataError", "shard damaged", 2.0)
    error = _cause([1, 4], tmp_path)
    assert isinstance(error, DataError)
    assert error.what == "shard damaged"
    assert error.remedy == "r"


def test_a_file_that_cannot_be_written_is_shown_before_what_followed_from_it(tmp_path):
    error_path(tmp_path, 0).parent.mkdir()
    codes = [
        _report(RuntimeError("Connection closed by peer"), tmp_path, 0),
        _report(OSError(errno.EROFS, os.strerror(errno.EROFS), "/some/file"), tmp_path, 1),
    ]
    assert codes == [HangError.exit_code, PreflightError.exit_code]
    error = _cause(codes, tmp_path)
    assert isinstance(error, PreflightError)
    assert "/some/file" in error.what
    assert "read-only (rank 1; the traceback is in" in error.why


def test_what_a_watchdog_said_is_not_replaced_by_what_followed_from_the_end_of_another_rank(tmp_path):
    error_path(tmp_path, 0).parent.mkdir()
    _report(HangError("a step did not end", "rank 0 was at: forward"), tmp_path, 0)
    _report(RuntimeError("Connection closed by peer"), tmp_path, 0)
    assert _cause([HangError.exit_code], tmp_path).why == "rank 0 was at: forward"


def test_among_equals_the_first_is_shown(tmp_path):
    leave(tmp_path, 0, "DataError", "later", 2.0)
    leave(tmp_path, 1, "DataError", "earlier", 1.0)
    assert _cause([4, 4], tmp_path).what == "earlier"


def test_a_rank_that_left_no_word_points_to_its_log(tmp_path):
    error = _cause([None, 3], tmp_path)
    assert isinstance(error, PreflightError)
    assert "rank-00001.log" in error.why
    assert isinstance(error, UnicomError)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda n: n.name)
def test_each_stop_signal_sets_the_flag_and_is_given_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert signal.getsignal(number) == before


def test_the_end_of_the_launcher_is_a_wish_to_stop():
    reader, writer = os.pipe()
    stop = StopRequest()
    stop.watch(os.fdopen(reader, "rb"))
    time.sleep(0.05)
    assert not stop.requested
    os.close(writer)
    deadline = time.monotonic() + 5
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stop.requested


def test_cores_are_shared_among_ranks():
    cores = len(os.sched_getaffinity(0))
    assert threads_per_rank(1, 0) == cores
    assert threads_per_rank(10 * cores, 0) == 1
    assert threads_per_rank(2, 7) == 7


def test_slurm_tasks_are_ranks_and_need_an_address(monkeypatch):
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    with pytest.raises(PreflightError, match="MASTER_ADDR"):
        environment()
    monkeypatch.setenv("MASTER_ADDR", "node0")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert environment() == (3, 4, 1)


def test_ranks_that_look_at_their_folder_at_once_do_not_disturb_each_other(tmp_path):
    config = tiny_config(tmp_path)
    together = threading.Barrier(4)

    def look() -> None:
        for _ in range(50):
            together.wait(10)
            preflight(config)

    with ThreadPoolExecutor(4) as ranks:
        for rank in [ranks.submit(look) for _ in range(4)]:
            rank.result()
    assert list(Path(config.run_dir).iterdir()) == []
