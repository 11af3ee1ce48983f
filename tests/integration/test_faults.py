"""What ends a run: signals, killed and stuck ranks, numbers that are not finite, damaged data. Each test starts a
launcher with one or two ranks of a plain engine, a few seconds each.
"""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from training_run import launcher, tiny_run, write_codec, write_stats

from unicom_dist.checkpoint.saved import latest, read_extra
from unicom_dist.config.errors import DataError, HangError, NonFiniteError, Preempted, PreflightError
from unicom_dist.tracking.status import read_status
from unicom_dist.train.pipeline import preflight, run

LONG = {"codec": {"steps": 100000, "checkpoint_every": 20}}
DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from training_run import tiny_run, write_stats
from unicom_dist.config.errors import UnicomError
from unicom_dist.train.pipeline import run
try:
    run(tiny_run(Path({folder!r}), **{overrides!r}), write_stats, only={stage!r}, say=print)
except UnicomError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def start(folder: Path, stage: str = "codec", **overrides: object) -> subprocess.Popen[str]:
    """A launcher in a process of its own, as `unicom train` is."""
    code = DRIVER.format(here=str(Path(__file__).parent), folder=str(folder), stage=stage, overrides=overrides)
    return launcher(code)


def wait_for_checkpoint(config, process: subprocess.Popen[str], stage: str = "codec", timeout_s: float = 150) -> Path:
    """The first checkpoint of a stage."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = latest(Path(config.run_dir) / "checkpoints" / stage)
        if found is not None:
            return found
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.kill()
    raise AssertionError(f"no checkpoint after {timeout_s} s: {process.communicate()[0]}")


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks a launcher started, in order of their start."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children]


def finish(process: subprocess.Popen[str], timeout_s: float = 120) -> tuple[int, str]:
    """Exit status and everything printed."""
    try:
        out, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running after {timeout_s} s: {process.communicate()[0]}") from None
    return process.returncode, out


def gone(pid: int, timeout_s: float = 30) -> bool:
    """Whether a process ends within the time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.dist
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_ends_in_a_checkpoint_of_the_step_reached(tmp_path, number):
    config = tiny_run(tmp_path, stages=LONG)
    process = start(tmp_path, stages=LONG)
    wait_for_checkpoint(config, process)
    process.send_signal(number)
    code, out = finish(process)
    assert code == 75, out
    step = int(re.search(r"stopped at step (\d+) of 100000, checkpoint written", out).group(1))
    assert read_extra(latest(Path(config.run_dir) / "checkpoints" / "codec"))["step"] == step
    assert read_status(config.run_dir).state == "preempted"
    assert "Traceback" not in out


@pytest.mark.dist
def test_a_killed_rank_ends_the_others_at_once_and_the_next_start_continues(tmp_path):
    overrides = {"stages": LONG, "parallel": {"nproc": 2, "zero_stage": 0}}
    config = tiny_run(tmp_path, **overrides)
    process = start(tmp_path, **overrides)
    wait_for_checkpoint(config, process)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    code, out = finish(process)
    assert code == HangError.exit_code == 7
    assert time.monotonic() - began < 20
    assert "rank 1 was ended by SIGKILL" in out
    assert "rank-00001.log" in out
    assert "Traceback" not in out
    assert all(gone(pid) for pid in ranks)
    reached = read_extra(latest(Path(config.run_dir) / "checkpoints" / "codec"))["step"]
    short = {"stages": {"codec": {"steps": reached + 2}}, "parallel": {"nproc": 1, "zero_stage": 0}}
    run(tiny_run(tmp_path, **short), write_stats, only="codec")
    state = json.loads((Path(config.run_dir) / "weights" / "codec" / "config.json").read_text())
    assert state["step"] == reached + 2


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_rank_of_zero3_killed_in_a_prior_stage_changes_no_bit_of_its_weights(tmp_path):
    steps = 30
    stages = {"alignment": {"steps": steps, "checkpoint_every": 5, "trainable": "all"}}
    overrides = {"stages": stages, "parallel": {"nproc": 2, "zero_stage": 3}}
    cut, whole = (tiny_run(tmp_path / name, **overrides) for name in ("cut", "whole"))
    for config in (cut, whole):
        write_codec(config)
    process = start(tmp_path / "cut", "alignment", **overrides)
    wait_for_checkpoint(cut, process, "alignment", timeout_s=300)
    ranks = ranks_of(process)
    os.kill(ranks[1], signal.SIGKILL)
    code, out = finish(process)
    assert code == 7, out
    assert "rank 1 was ended by SIGKILL" in out
    assert "continues from the last checkpoint" in out
    assert "Traceback" not in out
    assert all(gone(pid) for pid in ranks)
    assert read_extra(latest(Path(cut.run_dir) / "checkpoints" / "alignment"))["step"] < steps
    weights = []
    for config in (cut, whole):
        code, out = finish(start(Path(config.run_dir).parents[1], "alignment", **overrides), timeout_s=600)
        assert code == 0, out
        assert ("continues at step" in out) == (config is cut)
        weights.append((Path(config.run_dir) / "weights" / "alignment" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.dist
def test_ranks_stop_by_themselves_when_their_launcher_is_killed(tmp_path):
    config = tiny_run(tmp_path, stages=LONG)
    process = start(tmp_path, stages=LONG)
    wait_for_checkpoint(config, process)
    ranks = ranks_of(process)
    process.kill()
    process.wait()
    assert all(gone(pid) for pid in ranks)


@pytest.mark.dist
def test_a_stuck_rank_ends_the_run_after_the_timeout(tmp_path):
    overrides = {"stages": LONG, "parallel": {"nproc": 2, "zero_stage": 0, "timeout_s": 5}}
    config = tiny_run(tmp_path, **overrides)
    process = start(tmp_path, **overrides)
    wait_for_checkpoint(config, process)
    os.kill(ranks_of(process)[1], signal.SIGSTOP)
    code, out = finish(process)
    assert code == 7, out
    assert "waited too long for the others" in out


def test_numbers_that_are_not_finite_name_the_samples_and_leave_the_checkpoint(tmp_path):
    config = tiny_run(
        tmp_path, stages={"codec": {"lr": 1e38, "warmup": 0, "clip": 0.0, "weight_decay": 0.0, "checkpoint_every": 1}}
    )
    with pytest.raises(NonFiniteError):
        run(config, write_stats, only="codec")
    kept = json.loads((Path(config.run_dir) / "logs" / "spikes-rank-00000.jsonl").read_text())
    assert (kept["stage"], kept["kind"]) == ("codec", "nonfinite")
    assert len(kept["keys"][0]) == config.stage("codec").batch
    assert all(key.startswith("train-") for key in kept["keys"][0])
    found = latest(Path(config.run_dir) / "checkpoints" / "codec")
    assert found is not None
    assert read_extra(found)["step"] == kept["step"]
    status = read_status(config.run_dir)
    assert (status.state, status.stage) == ("failed", "codec")
    assert status.exit_code == NonFiniteError.exit_code == 6


@pytest.mark.parametrize(
    ("name", "left", "words"),
    [("tiny-000000.tar", 2000, "is cut off"), ("tiny-000000.random.tar", 0, "is empty (0 bytes)")],
)
def test_an_error_in_a_rank_reaches_the_caller_as_it_was_raised(tmp_path, name, left, words):
    config = tiny_run(tmp_path)
    shard = tmp_path / "data" / "train" / name
    shard.write_bytes(shard.read_bytes()[:left])
    with pytest.raises(DataError) as caught:
        run(config, write_stats, only="codec")
    assert f"{shard} {words}" in caught.value.what
    assert read_status(config.run_dir).exit_code == 4


def test_a_run_directory_that_cannot_be_written_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    config = tiny_run(tmp_path / "data").model_copy(update={"run_dir": str(tmp_path / "runs" / "x")})
    with pytest.raises(PreflightError, match="run_dir"):
        run(config, write_stats)


def test_a_nearly_full_disk_is_refused_before_anything_starts(tmp_path, monkeypatch):
    config = tiny_run(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 20})())
    with pytest.raises(PreflightError, match="MiB free"):
        preflight(config)


def test_a_stop_before_the_first_step_is_no_error_of_a_rank(tmp_path):
    process = start(tmp_path, stages=LONG)
    while not ranks_of(process):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    code, out = finish(process)
    assert code == Preempted.exit_code, out
