"""A joint stage between a prior and a decoder stage, on one rank: start, statistics, collapse, export. One process."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_run import tiny_run, write_stats

from unicom_dist.config.errors import CheckpointError
from unicom_dist.config.explain import write_config
from unicom_dist.config.schema import Config
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.sample.pipeline import UniComPipeline
from unicom_dist.tracking.metrics import read_metrics
from unicom_dist.train.pipeline import run
from unicom_dist.train.tasks import make_task

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
    import shutil

    shutil.copytree(finished.run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "weights" / "decoder")
    with pytest.raises(CheckpointError, match="trainable: decoder"):
        UniComPipeline.from_pretrained(tmp_path / "run")
