"""Ranks that torchrun or srun started: nobody looks after them, so what ends one of them has to reach the others and
the status file. Each test starts two processes.
"""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from training_run import tiny_run, write_codec, write_stats

from unicom_dist.config.errors import DataError, HangError
from unicom_dist.config.schema import Config
from unicom_dist.testing.distributed import RankFailure, free_port, run_ranks
from unicom_dist.tracking.status import read_status, write_status
from unicom_dist.train.ema import Ema
from unicom_dist.train.pipeline import run

TIMEOUT_S = 15
STALL_S = 4


def with_finished_codec(folder: Path) -> Config:
    """Codec, latents and one prior stage; the latents of an earlier codec are there."""
    config = tiny_run(folder, parallel={"nproc": 2, "timeout_s": TIMEOUT_S})
    kept = [config.stage(name) for name in ("codec", "latents", "alignment")]
    config = config.model_copy(update={"stages": kept})
    write_codec(config)
    return config


def slow(config: Config, *_: object) -> None:
    """Latents that take longer than a collective may."""
    time.sleep(TIMEOUT_S + 4)


def damaged(config: Config, *_: object) -> None:
    time.sleep(1)
    raise DataError("features are damaged", "why", "remedy")


def stopped(config: Config, *_: object) -> None:
    """Rank 0 is no more, for all that the other one can see."""
    time.sleep(2)  # what it sent before has arrived
    os.kill(os.getpid(), signal.SIGSTOP)


def prepare_latents(rank: int, world: int, folder: str, port: int) -> list[str]:
    """Latents that fail, that take long, and that never come. Module level: ranks import it."""
    config, seen = with_finished_codec(Path(folder)), []
    (Path(folder) / f"pid-{rank}").write_text(str(os.getpid()))
    try:
        run(config, damaged)
    except DataError as error:
        seen.append(error.what)
    if rank == 0:
        status = read_status(config.run_dir)
        assert status is not None
        assert (status.state, status.exit_code) == ("failed", 4)
        write_status(config.run_dir, "running")  # as the command does at its start
    run(config, slow)
    os.environ["MASTER_PORT"] = str(port)  # for the second process group of these processes
    if rank == 0:
        write_status(config.run_dir, "running", stage="latents")
    began = time.monotonic()
    try:
        run(config, stopped, only="latents")
    except HangError as error:
        seen += [error.what, str(time.monotonic() - began)]
    (Path(folder) / f"seen-{rank}").write_text(json.dumps(seen))
    os.kill(int((Path(folder) / "pid-0").read_text()), signal.SIGKILL)
    return seen


@pytest.mark.dist
def test_the_others_wait_for_the_latents_of_rank_0_its_failure_and_its_end(tmp_path):
    config = with_finished_codec(tmp_path)
    with pytest.raises(RankFailure, match="rank 0 died"):
        run_ranks(prepare_latents, 2, str(tmp_path), free_port(), timeout_s=200, init_group=False)
    failed, silent, seconds = json.loads((tmp_path / "seen-1").read_text())
    assert failed == "features are damaged"
    assert silent == f"nothing was seen of rank 0 for {TIMEOUT_S} s while it was computing the latents"
    assert float(seconds) < TIMEOUT_S + 5
    content = json.loads((Path(config.run_dir) / "weights" / "alignment" / "config.json").read_text())
    assert content["step"] == config.stage("alignment").steps  # after the latents that took long
    status = read_status(config.run_dir, check_process=False)
    assert status is not None
    assert (status.state, status.stage, status.exit_code, status.message) == ("failed", "latents", 7, silent)


def train_until_stuck(rank: int, world: int, folder: str, victim: int) -> None:
    """Rank `victim` is stopped in its fifth step. Module level: ranks import it."""
    update = Ema.update

    def stopping(self: Ema) -> None:
        update(self)
        if rank == victim and self.updates == 5:
            os.kill(os.getpid(), signal.SIGSTOP)

    Ema.update = stopping  # type: ignore[method-assign]
    parallel = {"nproc": 2, "zero_stage": 0, "stall_s": STALL_S}
    run(tiny_run(Path(folder), stages={"codec": {"steps": 1000}}, parallel=parallel), write_stats, only="codec")


@pytest.mark.dist
@pytest.mark.parametrize("victim", [0, 1])
def test_whichever_rank_finds_a_hang_the_status_says_so(tmp_path, victim):
    config = tiny_run(tmp_path)
    with pytest.raises(RankFailure, match=f"rank {1 - victim} died with exit code 7"):
        run_ranks(train_until_stuck, 2, str(tmp_path), victim, timeout_s=150, init_group=False)
    status = read_status(config.run_dir, check_process=False)
    assert status is not None
    assert (status.state, status.stage, status.exit_code) == ("failed", "codec", 7)
    assert status.message == f"a step did not end within {STALL_S} s"
