"""A whole recipe: every stage on one rank and on two ZeRO-3 ranks. Starts 1 and 2 processes, about a minute."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_run import losses, tiny_run, write_stats

from unicom_dist.config.errors import CheckpointError, ConfigError
from unicom_dist.data import overview
from unicom_dist.parallel.kernels import Kernels
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.testing.distributed import run_ranks
from unicom_dist.tracking.metrics import read_metrics
from unicom_dist.tracking.status import read_status
from unicom_dist.train import prior
from unicom_dist.train.loop import check_ranks
from unicom_dist.train.pipeline import run
from unicom_dist.train.tasks import make_task

STAGES = ("codec", "alignment", "pretrain", "continue", "sft")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = tiny_run(tmp_path_factory.mktemp("plain"))
    said: list[str] = []
    run(config, write_stats, say=said.append)
    return config, said


def test_every_stage_leaves_weights_checkpoint_and_pictures(finished):
    config, _ = finished
    folder = Path(config.run_dir)
    for stage in STAGES:
        content = json.loads((folder / "weights" / stage / "config.json").read_text())
        assert content["step"] == config.stage(stage).steps
        assert load_file(folder / "weights" / stage / "model.safetensors")
        assert list((folder / "samples" / stage).glob("*.png"))
        assert list((folder / "checkpoints" / stage).glob("step-*/COMPLETE"))
    status = read_status(folder)
    assert (status.state, status.stage, status.step) == ("done", "sft", config.stage("sft").steps)


def test_each_step_is_logged_once_and_evaluated_on_held_out_data(finished):
    config, _ = finished
    records = read_metrics(config.run_dir)
    for stage in STAGES:
        assert sorted(losses(config, stage)) == list(range(1, config.stage(stage).steps + 1))
        held_out = [r for r in records if r.stage == stage and r.kind == "eval"]
        assert {"loss/flow@0.3", "loss/flow@0.7"} <= held_out[-1].values.keys()
        assert ("loss/text" in held_out[-1].values) == (stage != "codec")


def test_the_end_of_a_stage_and_the_yardstick_of_its_mfu_are_recorded(finished):
    config, _ = finished
    records = read_metrics(config.run_dir)
    for stage in STAGES:
        of_stage = [record for record in records if record.stage == stage]
        assert (of_stage[-1].kind, of_stage[-1].step) == ("stage", config.stage(stage).steps)
        assert of_stage[-1].values == {"state": "done"}
        (yardstick,) = [record.values for record in of_stage if record.kind == "params"]
        assert yardstick["mfu_peak_flops_per_s"] > 0
        assert "measured" in yardstick["mfu_peak_source"]


def test_picture_grids_say_what_they_show(finished):
    config, _ = finished
    captions = set(overview.preview(config.data.path, "heldout", 100)[1])
    for stage in STAGES:
        path = max((Path(config.run_dir) / "samples" / stage).glob("*.json"))
        content = json.loads(path.read_text())
        assert (content["stage"], content["step"]) == (stage, config.stage(stage).steps)
        if stage == "codec":
            assert content["kind"] == "reconstructions"
            assert set(content["labels"][1::2]) == {"reconstructed"}
            assert set(content["labels"][::2]) <= captions
        else:
            assert (content["kind"], content["labels"]) == ("prompts", config.sample.prompts)


def test_a_second_start_skips_what_is_finished(finished):
    config, _ = finished
    said: list[str] = []
    run(config, write_stats, say=said.append)
    assert [line for line in said if "skipped" in line] == [f"{name}: finished before, skipped" for name in STAGES]


def test_connector_stage_moves_no_weight_of_the_backbone(finished):
    config, _ = finished
    task = make_task(config, config.stage("alignment"))
    before = dict(task.build(Mesh(0, 1, torch.device("cpu"))).named_parameters())
    after = load_file(Path(config.run_dir) / "weights" / "alignment" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name].bfloat16(), after[name])}
    assert moved
    assert not any(name.startswith("backbone.") for name in moved)


def test_kernels_that_are_compiled_for_a_length_see_whole_rows(finished, monkeypatch):
    config, _ = finished
    stage, alone = config.stage("pretrain"), Mesh(0, 1, torch.device("cpu"))
    monkeypatch.setattr(prior, "choose", lambda *_, **__: Kernels(flex_attention=True))
    task = make_task(config, stage)
    with task.loader(alone) as loader:
        batches = [batch for _ in range(4) for batch in loader.next_step()]
    share = task.build(alone).share
    assert len({batch.num_positions for batch in batches}) > 1
    whole = stage.batch // stage.micro_batches * stage.row_positions
    assert {share.rows(batch) for batch in batches} == {whole}
    assert {batch.plan.mask.seq_lengths for batch in batches} == {(whole, whole)}


def test_a_stage_starts_from_the_weights_of_the_one_before(finished):
    config, _ = finished
    first = losses(config, "sft")[1]
    assert losses(config, "pretrain")[1] > first  # text loss went on falling over the stages


def test_cutting_a_step_into_micro_batches_changes_nothing(finished, tmp_path):
    config, _ = finished
    cut = tiny_run(tmp_path, stages={name: {"micro_batches": 4} for name in STAGES})
    for stage in ("codec", "alignment"):
        write_stats(cut)
        run(cut, write_stats, only=stage)
        expected, got = losses(config, stage), losses(cut, stage)
        for step, value in expected.items():
            assert got[step] == pytest.approx(value, rel=2e-5), (stage, step)


@pytest.mark.dist
def test_two_zero3_ranks_train_as_one_plain_process(finished, tmp_path):
    config, _ = finished
    split = tiny_run(tmp_path, parallel={"nproc": 2, "zero_stage": 3})
    run(split, write_stats)
    for stage in STAGES:
        expected, got = losses(config, stage), losses(split, stage)
        assert got.keys() == expected.keys()
        for step, value in expected.items():
            assert got[step] == pytest.approx(value, rel=2e-5), (stage, step)


def join(rank: int, world: int, folder: str) -> None:
    """One of several ranks that somebody else started; module level: ranks import it."""
    run(tiny_run(Path(folder)), write_stats, only="codec")


@pytest.mark.dist
def test_ranks_that_somebody_else_started_join_and_train_the_same(finished, tmp_path):
    config, _ = finished
    tiny_run(tmp_path)
    run_ranks(join, 2, str(tmp_path), init_group=False)
    joined = tiny_run(tmp_path)
    for step, value in losses(config, "codec").items():
        assert losses(joined, "codec")[step] == pytest.approx(value, rel=2e-5), step
    assert read_status(joined.run_dir).state == "done"


def test_a_batch_that_does_not_divide_among_the_ranks_is_refused(finished):
    config, _ = finished
    with pytest.raises(ConfigError, match=r"stages\.codec\.batch = 8 with 3 replicas"):
        check_ranks(config, 3)


def test_another_model_under_the_same_run_directory_is_refused(finished):
    config, _ = finished
    wider = tiny_run(
        Path(config.run_dir).parents[1], prior={"hidden": 64}, stages={"sft": {"steps": 4}, "codec": {"steps": 4}}
    )
    with pytest.raises(CheckpointError, match="holds another model") as caught:
        run(wider, write_stats, only="sft")
    assert "undo the change" in caught.value.remedy


def test_no_stages_is_a_configuration_error(tmp_path):
    config = tiny_run(tmp_path)
    with pytest.raises(ConfigError, match="stages is empty"):
        run(config.model_copy(update={"stages": []}), write_stats)
