"""A joint stage between a prior and a decoder stage: start, statistics, collapse, conversion. One process."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_run import StopAfter, tiny_run, write_stats

from unicom_dist.checkpoint.saved import Checkpoint, latest
from unicom_dist.checkpoint.weights import read_weights
from unicom_dist.cli.main import run as unicom
from unicom_dist.config.errors import CheckpointError, CollapseError, Preempted
from unicom_dist.config.explain import write_config
from unicom_dist.config.schema import Config, StageConfig
from unicom_dist.models.joint import OWN
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.sample.pipeline import UniComPipeline
from unicom_dist.tracking.metrics import read_metrics
from unicom_dist.train.loop import train_stage
from unicom_dist.train.pipeline import run
from unicom_dist.train.tasks import make_task
from unicom_dist.train.watchdog import Watchdog

PRIOR = {
    "kind": "prior",
    "batch": 2,
    "row_positions": 128,
    "warmup": 1,
    "ema": 0.5,
    "precision": "float32",
    "log_every": 1,
}
CODEC = {"name": "codec", "kind": "codec", "steps": 2, "batch": 4, "precision": "float32", "log_every": 1}
JOINT = {**PRIOR, "name": "joint", "steps": 4, "lr": 1e-3, "mixture": {"text": 1, "text_to_image": 3}}


def recipe(folder: Path, **changes) -> Config:
    stages = [
        CODEC,
        {"name": "latents", "kind": "latents"},
        {**PRIOR, "name": "pretrain", "steps": 2, "mixture": {"text_to_image": 1}},
        {**JOINT, "joint": {"enabled": True}, **changes},
        {**CODEC, "name": "decoder", "trainable": "decoder"},
    ]
    return tiny_run(folder, stages=stages)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Config:
    config = recipe(tmp_path_factory.mktemp("joint"))
    write_config(config.run_dir, config, {})
    run(config, write_stats)
    return config


def weights(config: Config, stage: str) -> Path:
    return Path(config.run_dir) / "weights" / stage


def test_the_compressor_starts_from_the_codec_and_the_prior_from_the_stage_before(finished):
    task = make_task(finished, finished.stage("joint"))
    built = dict(task.build(Mesh(0, 1, torch.device("cpu"))).named_parameters())
    codec = load_file(weights(finished, "codec") / "model.safetensors")
    for name, tensor in codec.items():
        if name.startswith("compressor."):
            assert torch.equal(built[name].bfloat16(), tensor)
        if name.startswith("decompressor."):
            assert torch.equal(built[f"reconstruct.{name}"].bfloat16(), tensor)
    assert [name for name in built if task.begins(name)] == [
        n for n in built if n.startswith(("compressor", "reconstruct"))
    ]


def test_the_metrics_have_the_reconstruction_and_the_latents(finished):
    steps = [r for r in read_metrics(finished.run_dir) if r.stage == "joint" and r.kind == "train"]
    assert [record.step for record in steps] == [1, 2, 3, 4]
    for record in steps:
        assert {"loss/recon", "latents/mean_abs", "latents/std_min", "latents/std_mean"} <= record.values.keys()
    assert any("latents/effective_rank" in record.values for record in steps)
    held_out = [r for r in read_metrics(finished.run_dir) if r.stage == "joint" and r.kind == "eval"]
    assert {"loss/recon@0.3", "loss/flow@0.3", "loss/text"} <= held_out[-1].values.keys()


def test_the_export_holds_prior_compressor_and_statistics(finished):
    folder = weights(finished, "joint")
    content = json.loads((folder / "config.json").read_text())
    about = json.loads((folder / "compressor" / "config.json").read_text())
    assert not [n for n in load_file(folder / "model.safetensors") if n.startswith(("compressor.", "reconstruct."))]
    assert {n.split(".")[0] for n in load_file(folder / "compressor" / "model.safetensors")} == {
        "compressor",
        "reconstruct",
    }
    assert content["codec_fingerprint"] == about["fingerprint"]
    before = json.loads((weights(finished, "pretrain") / "config.json").read_text())
    assert content["codec_fingerprint"] != before["codec_fingerprint"]
    assert content["stats"] == about["stats"] != before["stats"]


def test_the_decoder_stage_keeps_the_compressor_and_goes_with_the_prior(finished):
    made = load_file(weights(finished, "joint") / "compressor" / "model.safetensors")
    decoder, codec = (load_file(weights(finished, stage) / "model.safetensors") for stage in ("decoder", "codec"))
    for name, tensor in decoder.items():
        assert torch.equal(tensor, made[name]) if name.startswith("compressor.") else True
    assert any(not torch.equal(decoder[name], codec[name]) for name in codec if name.startswith("compressor."))
    assert any(not torch.equal(decoder[name], codec[name]) for name in codec if name.startswith("decoder."))
    pipeline = UniComPipeline.from_pretrained(Path(finished.run_dir))
    assert pipeline.content["fingerprint"] == pipeline.prior.content["codec_fingerprint"]


def test_a_decoder_of_another_compressor_is_refused(finished, tmp_path):
    shutil.copytree(finished.run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "weights" / "decoder")
    with pytest.raises(CheckpointError, match="trainable: decoder"):
        UniComPipeline.from_pretrained(tmp_path / "run")


def again(finished: Config, folder: Path, **changes) -> Config:
    """The finished run up to its joint stage, which is changed, elsewhere."""
    target = folder / "run"
    shutil.copytree(finished.run_dir, target)
    for part in ("weights", "checkpoints"):
        for stage in ("joint", "decoder"):
            shutil.rmtree(target / part / stage, ignore_errors=True)
    stages = [
        StageConfig.model_validate({**stage.model_dump(), **changes}) if stage.name == "joint" else stage
        for stage in finished.stages
    ]
    return finished.model_copy(update={"run_dir": str(target), "stages": stages})


def train_joint(config: Config, stop_after: int = 0) -> None:
    torch.set_num_threads(config.parallel.threads)  # as the ranks do: sums of other lengths round differently
    stage = config.stage("joint")
    train_stage(config, stage, Mesh(0, 1, torch.device("cpu")), StopAfter(stop_after), Watchdog(), None)


def test_an_interrupted_stage_ends_bit_equal_statistics_included(finished, tmp_path):
    config = again(finished, tmp_path)
    with pytest.raises(Preempted):
        train_joint(config, stop_after=2)
    train_joint(config)
    for name in ("model.safetensors", "compressor/model.safetensors"):
        one, two = (load_file(weights(each, "joint") / name) for each in (finished, config))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    one, two = (json.loads((weights(each, "joint") / "config.json").read_text()) for each in (finished, config))
    assert one["joint"] == two["joint"]
    assert one["codec_fingerprint"] == two["codec_fingerprint"]


def checkpoint_of(config: Config, stage: str = "joint") -> Path:
    found = latest(Path(config.run_dir) / "checkpoints" / stage)
    assert found is not None
    return found


def test_a_checkpoint_exports_what_the_run_does(finished, tmp_path):
    sources = {"run": Path(finished.run_dir), "checkpoint": checkpoint_of(finished)}
    for name, source in sources.items():
        assert unicom(["convert", "export", str(source), str(tmp_path / name)]) == 0
        assert unicom(["convert", "export", str(source), str(tmp_path / f"{name}-qwen"), "--format", "qwen"]) == 0
    for part in ("codec", "prior"):
        (one, first), (two, second) = (read_weights(tmp_path / name / part) for name in sources)
        assert one == two
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    first, second = (load_file(tmp_path / f"{name}-qwen" / "model.safetensors") for name in sources)
    assert first.keys() == second.keys()
    assert all(name.startswith(("model.", "lm_head.")) for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(UniComPipeline.from_pretrained(tmp_path / "checkpoint")("a red circle", 1, 1, decoder_steps=1)) == 1


def test_weights_that_no_decoder_goes_with_are_not_exported_as_a_model(finished, tmp_path, capsys):
    before = again(finished, tmp_path)
    with pytest.raises(Preempted):
        train_joint(before, stop_after=2)
    out = tmp_path / "out"
    for source, weights_ in ((checkpoint_of(before), "ema"), (checkpoint_of(finished), "raw")):
        assert unicom(["convert", "export", str(source), str(out), "--weights", weights_]) == 5
        shown = capsys.readouterr().err
        assert "codec fingerprint: " in shown
        assert "trainable: decoder" in shown
        assert not out.exists()
        assert unicom(["convert", "export", str(source), str(out), "--weights", weights_, "--format", "qwen"]) == 0
        shutil.rmtree(out)


@pytest.mark.parametrize("sizes", ["tp=2,pp=2,dp=2", "dp=3"])
def test_a_resharded_stage_goes_on_as_it_would_have(finished, tmp_path, sizes):
    config = again(finished, tmp_path)
    with pytest.raises(Preempted):
        train_joint(config, stop_after=2)
    original, out = checkpoint_of(config), tmp_path / "step-000002"
    assert unicom(["convert", "reshard", str(original), str(out), "--layout", sizes]) == 0
    old, new = Checkpoint(original), Checkpoint(out)
    assert new.state["model"] == old.state["model"]
    for kind in old.all_kinds:
        first, second = old.tensors(kind), new.tensors(kind)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    holders = {number for name in new.shapes if name.startswith(OWN) for number, _ in new.fragments(name)}
    assert holders == ({0, 2} if "pp" in sizes else {0, 1, 2})  # the dp ranks of the first pp_stage
    shutil.rmtree(original)
    shutil.copytree(out, original)
    train_joint(config)
    for name in ("model.safetensors", "compressor/model.safetensors"):
        one, two = (load_file(weights(each, "joint") / name) for each in (finished, config))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_collapse_ends_the_stage_with_status_6_and_keeps_the_checkpoint_before(finished, tmp_path):
    # The statistics it is given are wider than the codec's latents are.
    joint = {"enabled": True, "momentum": 0.3, "collapse": 0.7}
    config = again(finished, tmp_path, checkpoint_every=1, steps=20, joint=joint)
    with pytest.raises(CollapseError, match=r"the latents of stage 'joint' collapsed by step ([2-9]|1\d)") as caught:
        train_joint(config)
    assert caught.value.exit_code == 6
    assert [path.name for path in (Path(config.run_dir) / "checkpoints" / "joint").glob("step-*/COMPLETE")]
    assert not weights(config, "joint").exists()
