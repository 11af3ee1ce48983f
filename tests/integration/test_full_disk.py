"""Disks that are full and folders that may not be written, for real: small or read-only mounts that one process sees.

Skipped where a process may not have mounts of its own. Each test starts a process, some a rank or two: seconds each.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from training_run import tiny_run

from pipelines import ingest
from unicom_dist.data.shardset import ShardSet
from unicom_dist.data.tar import index_path
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets
from unicom_dist.tracking.status import read_status

TRAIN = """
import sys
from contextlib import suppress
from pathlib import Path
sys.path.insert(0, {here!r})
from training_run import tiny_run, write_stats
from unicom_dist.cli.failure import guarded
from unicom_dist.train import pipeline
config, folder = tiny_run(Path({folder!r}), parallel={parallel!r}), Path({run!r})
def train(say=print):
    pipeline.run(config, write_stats, only="codec", say=say)
"""


def with_mounts(mounts: str, code: str) -> subprocess.CompletedProcess[str]:
    """`code` in a Python whose file system is as the shell commands `mounts` have left it, unlike everybody else's."""
    shell = ["unshare", "--map-root-user", "--mount", "sh", "-ec", f'{mounts}\nexec "$0" -c "$1"']
    done = subprocess.run([*shell, sys.executable, code], capture_output=True, text=True, timeout=200, check=False)
    assert "Traceback" not in done.stdout + done.stderr
    return done


@pytest.fixture(autouse=True)
def permitted() -> None:
    try:
        done = with_mounts("mount -t tmpfs tmpfs /mnt", "")
    except FileNotFoundError:
        pytest.skip("there is no `unshare`")
    if done.returncode:
        pytest.skip(f"no mounts of its own: {done.stderr.strip()}")


def full(folder: Path) -> str:
    return f"mkdir -p {folder}; mount -t tmpfs -o size=4k tmpfs {folder}"


def read_only(path: Path) -> str:
    return f"mount --bind {path} {path}; mount -o remount,bind,ro {path}"


def training(folder: Path, what: str, **parallel: int) -> tuple[Path, str]:
    """The run directory of a tiny codec, and a script that has it in reach and does `what`."""
    run = Path(tiny_run(folder).run_dir)
    here = str(Path(__file__).parent)
    return run, TRAIN.format(here=here, folder=str(folder), parallel=parallel, run=str(run)) + what


@pytest.mark.dist
def test_pictures_that_do_not_fit_are_lost_and_training_goes_on(tmp_path: Path) -> None:
    what = "train()\nprint([path.name for path in (folder / 'samples').rglob('*') if path.is_file()])"
    run, code = training(tmp_path, what)
    done = with_mounts(full(run / "samples"), code)
    assert done.returncode == 0, done.stderr
    assert "step 4 pictures are lost" in done.stdout
    assert "the disk is full" in done.stdout
    assert done.stdout.endswith("[]\n"), "half a picture was left"
    assert (run / "weights" / "codec" / "config.json").is_file()
    assert read_status(run).state == "done"


@pytest.mark.dist
def test_a_rank_that_may_not_write_says_which_file_and_ends_all_with_the_status_of_the_machine(tmp_path: Path) -> None:
    run, code = training(tmp_path, "sys.exit(guarded(train))", nproc=2, zero_stage=3)
    settings = run / "deepspeed-codec.json"
    settings.write_text("{}")
    done = with_mounts(read_only(settings), code)
    assert done.returncode == 3, done.stdout + done.stderr
    assert str(settings) in done.stderr
    assert "the file system is read-only (rank 0; the traceback is in" in done.stderr
    assert settings.read_text() == "{}"
    assert read_status(run).exit_code == 3


@pytest.mark.dist
def test_a_disk_without_room_for_a_word_ends_the_run_with_the_status_of_the_machine(tmp_path: Path) -> None:
    what = """
def fill(line):
    if "training; ranks" in line:
        (folder / "logs").mkdir()
        with suppress(OSError), (folder / "logs" / "rank-00000.log").open("wb", buffering=0) as log:
            while log.write(bytes(4096)):
                pass
pipeline.MIN_FREE_BYTES = 0
sys.exit(guarded(lambda: train(fill)))
"""
    run, code = training(tmp_path, what)
    done = with_mounts(f"mount -t tmpfs -o size=64k tmpfs {run}", code)
    assert done.returncode == 3, done.stdout + done.stderr
    assert f"left no word\n  why:  it could not start, or the disk of {run} is full" in done.stderr


def test_a_read_only_data_folder_is_said_before_features_are_computed_and_can_be_read(tmp_path: Path) -> None:
    write_tiny_assets(tmp_path)
    config = tiny_config(tmp_path)
    ingest.run(config, workers=1)
    train = Path(config.data.path) / "train"
    samples = ShardSet(train)
    keys = [samples[number].key for number in range(len(samples))]
    for shard in train.glob("*.tar"):
        index_path(shard).unlink()
    before = {path: path.read_bytes() for path in train.rglob("*") if path.is_file()}
    code = f"""
import sys
from pathlib import Path
from pipelines import features
from unicom_dist.cli.failure import guarded
from unicom_dist.data.shardset import ShardSet
from unicom_dist.testing.tiny import tiny_config
samples = ShardSet({str(train)!r})
print([samples[number].key for number in range(len(samples))])
sys.exit(guarded(lambda: features.run(tiny_config(Path({str(tmp_path)!r})))))
"""
    done = with_mounts(read_only(Path(config.data.path)), code)
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stdout == f"{keys}\n"
    assert "the file system is read-only" in done.stderr
    assert {path: path.read_bytes() for path in train.rglob("*") if path.is_file()} == before
