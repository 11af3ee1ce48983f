"""The status file: atomic, and honest about processes that are gone. One process, seconds."""

import os
import subprocess
import sys
from pathlib import Path

from unicom_dist.tracking.status import STATUS_FILE, process_alive, read_status, write_status


def gone_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_status_comes_back_as_written(tmp_path: Path) -> None:
    write_status(tmp_path, "running", stage="codec", step=7)
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.stage, status.step, status.pid) == ("running", "codec", 7, os.getpid())
    assert not status.final


def test_a_run_whose_process_is_gone_has_failed(tmp_path: Path) -> None:
    pid = gone_pid()
    write_status(tmp_path, "running", pid=pid)
    status = read_status(tmp_path)
    assert status is not None
    assert status.state == "failed"
    assert str(pid) in status.message
    written = read_status(tmp_path, check_process=False)
    assert written is not None
    assert written.state == "running"


def test_a_killed_child_not_waited_for_is_not_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert process_alive(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not process_alive(process.pid)
    process.wait()


def test_a_final_status_stays_whatever_became_of_the_process(tmp_path: Path) -> None:
    write_status(tmp_path, "preempted", pid=gone_pid(), exit_code=75)
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.exit_code, status.final) == ("preempted", 75, True)


def test_a_rank_keeps_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import sys; from unicom_dist.tracking.status import write_status; write_status(sys.argv[1], 'running', step=3)"
    )
    for owner, expected in ((os.getpid(), os.getpid()), (gone_pid(), None)):
        write_status(tmp_path, "running", pid=owner)
        child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
        child.wait()
        status = read_status(tmp_path, check_process=False)
        assert status is not None
        assert (status.pid, status.step) == (expected or child.pid, 3)


def test_missing_or_damaged_status_is_none(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    for content in ("", "{", "[]", '{"state": "flying"}', "{}"):
        (tmp_path / STATUS_FILE).write_text(content)
        assert read_status(tmp_path) is None


def test_writing_leaves_no_other_file(tmp_path: Path) -> None:
    for _ in range(3):
        write_status(tmp_path, "running")
    assert [path.name for path in tmp_path.iterdir()] == [STATUS_FILE]
