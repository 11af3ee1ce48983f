"""Stopping and continuing: bit for bit on the same layout, the same samples and weights on another. 1 or 2 ranks."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_run import StopAfter, losses, tiny_run, write_codec, write_stats

from unicom_dist.checkpoint.saved import checkpoints, latest, read_extra
from unicom_dist.config.errors import CheckpointError, Preempted
from unicom_dist.config.schema import Config
from unicom_dist.parallel.mesh import Mesh, init_mesh, join
from unicom_dist.testing.distributed import run_ranks
from unicom_dist.train.loop import start_run, train_stage
from unicom_dist.train.pipeline import prepare_vocabulary
from unicom_dist.train.watchdog import Watchdog

STEPS = {"codec": {"steps": 6}, "sft": {"steps": 6, "mixture": {"text": 1, "text_to_image": 1, "image_to_text": 1}}}


def configure(folder: Path, stage: str, zero_stage: int, nproc: int):
    """A recipe of the codec and one more stage; its data and, for a prior, an untrained codec are there."""
    config = tiny_run(folder, stages=STEPS, parallel={"zero_stage": zero_stage, "nproc": nproc})
    kept = [item for item in config.stages if item.name in ("codec", stage)]
    config = config.model_copy(update={"stages": kept})
    write_stats(config)
    prepare_vocabulary(config)
    if stage != "codec":
        write_codec(config)
    return config


def mesh_of(config: Config, stage: str) -> Mesh:
    """The ranks that are there, laid out as the stage wants them."""
    return init_mesh(config.layout(config.stage(stage), join()[1]), 60)


def continue_stage(config: Config, stage: str, stop_after: int = 0) -> None:
    """Train one stage in this process group."""
    train_stage(config, config.stage(stage), mesh_of(config, stage), StopAfter(stop_after), Watchdog(), None)


def train(rank: int, world: int, folder: str, stage: str, zero_stage: int, stop_after: int) -> str:
    """Train on this rank until the end or the stop; what ended it. Module level: ranks import it."""
    config = configure(Path(folder), stage, zero_stage, world)
    torch.rand(1 if stop_after else 7)  # the global random state of a new process is not that of the one before
    try:
        continue_stage(config, stage, stop_after)
    except Preempted:
        return "preempted"
    return "done"


def final_state(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    """Everything in the last checkpoint: weights, moments, averages."""
    config = configure(folder, stage, 0, 1)
    found = latest(Path(config.run_dir) / "checkpoints" / stage)
    assert found is not None
    tensors = {}
    for path in sorted(found.glob("*.safetensors")):
        tensors |= {f"{path.name}/{name}": t for name, t in load_file(path).items() if name != "rng/torch"}
    return tensors


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stage", ["codec", "sft"])
def test_stopping_and_continuing_changes_no_bit(tmp_path, stage):
    assert train(0, 1, str(tmp_path / "whole"), stage, 0, 0) == "done"
    assert train(0, 1, str(tmp_path / "cut"), stage, 0, 3) == "preempted"
    cut = configure(tmp_path / "cut", stage, 0, 1)
    assert read_extra(latest(Path(cut.run_dir) / "checkpoints" / stage))["step"] == 3
    assert train(0, 1, str(tmp_path / "cut"), stage, 0, 0) == "done"
    assert equal(final_state(tmp_path / "whole", stage), final_state(tmp_path / "cut", stage))
    whole = configure(tmp_path / "whole", stage, 0, 1)
    assert losses(whole, stage) == losses(cut, stage)


def train_variants(rank: int, world: int, folder: str) -> list[str]:
    """On two ranks, one after the other: a whole run; one that stops; a copy of it set aside; its continuation."""
    ended = [train(rank, world, f"{folder}/whole", "sft", 3, 0), train(rank, world, f"{folder}/cut", "sft", 3, 2)]
    mesh = init_mesh(timeout_s=60)
    if rank == 0:
        shutil.copytree(Path(folder) / "cut", Path(folder) / "other")
    mesh.barrier()
    return [*ended, train(rank, world, f"{folder}/cut", "sft", 3, 0)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for name in ("whole", "cut"):
        configure(folder / name, "sft", 3, 2)
    ended = run_ranks(train_variants, 2, str(folder), timeout_s=240)
    return folder, ended


@pytest.mark.dist
def test_two_zero3_ranks_stop_together_and_continue_bit_for_bit(two_ranks):
    folder, ended = two_ranks
    assert ended == [["done", "preempted", "done"]] * 2
    assert equal(final_state(folder / "whole", "sft"), final_state(folder / "cut", "sft"))


@pytest.mark.dist
def test_a_checkpoint_continues_on_another_number_of_ranks(two_ranks):
    folder, _ = two_ranks
    assert train(0, 1, str(folder / "other"), "sft", 0, 0) == "done"
    two, one = (losses(configure(folder / name, "sft", 0, 1), "sft") for name in ("cut", "other"))
    assert two.keys() == one.keys() == set(range(1, 7))
    for step, value in two.items():
        assert one[step] == pytest.approx(value, rel=2e-5), step


def test_loading_under_another_layout_gives_equal_bits(tmp_path):
    assert train(0, 1, str(tmp_path), "sft", 0, 3) == "preempted"
    saved = final_state(tmp_path, "sft")
    config = configure(tmp_path, "sft", 0, 1)
    run = start_run(config, config.stage("sft"), mesh_of(config, "sft"), StopAfter(0), Watchdog())
    for kind, buffers in {**run.engine.state(), "ema": run.ema.buffers}.items():
        for f in run.engine.fragments:
            piece = buffers[f.group][f.start : f.start + f.numel]
            assert torch.equal(piece, saved[f"rank-00000-of-00001.safetensors/{kind}/{f.name}"])
    run.loader.close()


def test_only_the_newest_checkpoints_are_kept_and_incomplete_ones_ignored(tmp_path):
    config = configure(tmp_path, "codec", 0, 1)
    every = config.stage("codec").model_copy(update={"checkpoint_every": 1})
    config = config.model_copy(update={"stages": [every]})
    continue_stage(config, "codec")
    folder = Path(config.run_dir) / "checkpoints" / "codec"
    assert [path.name for path in checkpoints(folder)] == ["step-000005", "step-000006"]
    (folder / "step-000006" / "COMPLETE").unlink()
    assert latest(folder) == folder / "step-000005"
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        read_extra(folder / "step-000006")


def test_a_damaged_checkpoint_says_which_file_and_what_to_do(tmp_path):
    assert train(0, 1, str(tmp_path), "codec", 0, 3) == "preempted"
    config = configure(tmp_path, "codec", 0, 1)
    file = next((Path(config.run_dir) / "checkpoints" / "codec" / "step-000003").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=file.name) as caught:
        train(0, 1, str(tmp_path), "codec", 0, 0)
    assert "remove" in caught.value.remedy


def test_a_stage_that_has_gone_further_than_configured_is_refused(tmp_path):
    assert train(0, 1, str(tmp_path), "codec", 0, 5) == "preempted"
    config = configure(tmp_path, "codec", 0, 1)
    short = config.stage("codec").model_copy(update={"steps": 4})
    with pytest.raises(CheckpointError, match="is at step 5"):
        continue_stage(config.model_copy(update={"stages": [short]}), "codec")
