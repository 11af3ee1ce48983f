"""A run on 8 ranks (pipeline, tensor and sequence parallelism, ZeRO-3), stopped, continued on 4 (tensor parallelism).

Its losses lie on those of one process. Starts 1, 8 and 4 processes, most of whose time are imports: some minutes.
"""

import signal
import subprocess
import time
from pathlib import Path

import pytest
from training_run import launcher, losses, tiny_run, write_stats

from unicom_dist.config.schema import Config
from unicom_dist.tracking.metrics import read_metrics
from unicom_dist.tracking.status import read_status
from unicom_dist.train.pipeline import run

STAGES = {"pretrain": {"steps": 60, "warmup": 20, "checkpoint_every": 20}}
EIGHT = {"nproc": 8, "zero_stage": 3, "pp": 2, "tp": 2, "timeout_s": 240}
FOUR = {"nproc": 4, "zero_stage": 3, "tp": 4, "timeout_s": 240}
DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from training_run import tiny_run, write_stats
from unicom_dist.config.errors import UnicomError
from unicom_dist.train.pipeline import run
config = tiny_run(Path({folder!r}), stages={stages!r}, parallel={parallel!r})
kept = [config.stage(name) for name in ("codec", "latents", "alignment", "pretrain")]
try:
    run(config.model_copy(update={{"stages": kept}}), write_stats, say=print)
except UnicomError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def start(folder: Path, parallel: dict[str, int]) -> subprocess.Popen[str]:
    """The launcher, as `unicom train` is."""
    here = str(Path(__file__).parent)
    code = DRIVER.format(here=here, folder=str(folder), stages=STAGES, parallel=parallel)
    return launcher(code)


def steps_of(config: Config, stage: str) -> list[int]:
    """Steps in metrics.jsonl so far."""
    found = [r.step for r in read_metrics(config.run_dir) if r.stage == stage and r.kind == "train"]
    return sorted(found)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_eight_ranks_stop_and_four_continue_on_the_losses_of_one_process(tmp_path):
    process = start(tmp_path / "many", EIGHT)
    config = tiny_run(tmp_path / "many", stages=STAGES, parallel=EIGHT)
    deadline = time.monotonic() + 700
    while len(steps_of(config, "pretrain")) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no step of the second stage"
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 75, out
    assert read_status(config.run_dir).state == "preempted"
    stopped = steps_of(config, "pretrain")[-1]
    assert stopped < STAGES["pretrain"]["steps"]

    process = start(tmp_path / "many", FOUR)
    out, _ = process.communicate(timeout=700)
    assert process.returncode == 0, out

    one = tiny_run(tmp_path / "one", stages=STAGES)
    kept = [one.stage(name) for name in ("codec", "latents", "alignment", "pretrain")]
    run(one.model_copy(update={"stages": kept}), write_stats)
    for stage in ("codec", "alignment", "pretrain"):
        expected, got = losses(one, stage), losses(config, stage)
        assert got.keys() == expected.keys() == set(range(1, one.stage(stage).steps + 1))
        for step, value in expected.items():
            assert got[step] == pytest.approx(value, rel=1e-5), (stage, step)
    last, alone = (held_out(config), held_out(one))
    assert last.keys() == alone.keys()
    assert last == {name: pytest.approx(value, rel=1e-4) for name, value in alone.items()}
    assert (Path(config.run_dir) / "samples" / "pretrain" / "step-000060.png").exists()


def held_out(config: Config) -> dict[str, float]:
    """Losses on held-out data at the end of the last stage."""
    return [r.values for r in read_metrics(config.run_dir) if r.stage == "pretrain" and r.kind == "eval"][-1]
