"""Model folders and run directories on disk. One process, a few seconds."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from unicom_dist.cli.main import run
from unicom_dist.config.errors import CheckpointError, DataError
from unicom_dist.sample.loading import find_parts, load_codec, load_prior, stage_names
from unicom_dist.sample.pipeline import UniComPipeline
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets
from unicom_dist.testing.tiny_run import write_tiny_weights


@pytest.fixture
def config(tmp_path):
    write_tiny_assets(tmp_path)
    config = tiny_config(tmp_path)
    write_tiny_weights(config)
    return config


def draw(pipeline: UniComPipeline) -> np.ndarray:
    return np.stack([np.asarray(p) for p in pipeline(["a red circle", "cat"], [1, 2], steps=2, decoder_steps=2)])


def test_saved_and_loaded_again_draws_the_same_pictures_to_the_bit(config, tmp_path):
    pipeline = UniComPipeline.from_pretrained(config.run_dir)
    pipeline.save_pretrained(tmp_path / "model", torch.float32)
    moved = tmp_path / "elsewhere"
    (tmp_path / "model").rename(moved)
    (tmp_path / "assets").rename(tmp_path / "gone")  # a model folder needs no tokenizer from outside
    again = UniComPipeline.from_pretrained(moved)
    assert np.array_equal(draw(pipeline), draw(again))
    assert stage_names(moved) == ["sft"]


def test_bfloat16_weights_change_pictures_little(config, tmp_path):
    pipeline = UniComPipeline.from_pretrained(config.run_dir)
    pipeline.save_pretrained(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "prior" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    error = np.abs(draw(pipeline).astype(int) - draw(UniComPipeline.from_pretrained(tmp_path / "model")).astype(int))
    assert 0 < error.mean() < 4


def test_nothing_stays_on_the_meta_device_and_weights_stay_tied(config):
    parts = find_parts(config.run_dir)
    assert parts.prior is not None
    prior, codec = load_prior(parts.prior).model, load_codec(parts.codec).model
    tensors = [*prior.parameters(), *prior.buffers(), *codec.parameters(), *codec.buffers()]
    assert not any(tensor.is_meta for tensor in tensors)
    assert prior.backbone.lm_head.weight is prior.backbone.model.embed_tokens.weight


def test_the_last_finished_stage_is_taken_unless_another_is_named(config, tmp_path):
    weights = tmp_path / "runs" / "tiny" / "weights"
    assert find_parts(config.run_dir).prior == weights / "sft"
    assert find_parts(config.run_dir, "pretrain").prior == weights / "pretrain"
    (weights / "sft").rename(tmp_path / "sft")
    assert find_parts(config.run_dir).prior == weights / "continue"
    with pytest.raises(CheckpointError, match="no finished prior stage 'sft'"):
        find_parts(config.run_dir, "sft")
    assert stage_names(config.run_dir) == ["alignment", "pretrain", "continue"]


def test_a_run_with_a_codec_only_reconstructs(config, tmp_path):
    for stage in stage_names(config.run_dir):
        (tmp_path / "runs" / "tiny" / "weights" / stage).rename(tmp_path / stage)
    pipeline = UniComPipeline.from_pretrained(config.run_dir)
    with pytest.raises(CheckpointError, match="no prior yet"):
        draw(pipeline)


def test_a_codec_trained_again_is_not_paired_with_the_old_prior(config, tmp_path):
    folder = tmp_path / "runs" / "tiny" / "weights" / "codec"
    before = load_codec(folder).content["fingerprint"]
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, folder / "model.safetensors")
    after = load_codec(folder).content["fingerprint"]
    assert before != after
    with pytest.raises(CheckpointError, match="do not belong together") as caught:
        UniComPipeline.from_pretrained(config.run_dir)
    assert caught.value.why == f"codec fingerprint: {after} in the codec, {before} in the prior"


def test_a_codec_of_another_model_folder_is_refused(config, tmp_path):
    UniComPipeline.from_pretrained(config.run_dir).save_pretrained(tmp_path / "one")
    other = config.model_copy(update={"seed": 1, "run_dir": str(tmp_path / "runs" / "other")})
    write_tiny_weights(other)
    UniComPipeline.from_pretrained(other.run_dir).save_pretrained(tmp_path / "two")
    (tmp_path / "one" / "codec").rename(tmp_path / "gone")
    (tmp_path / "two" / "codec").rename(tmp_path / "one" / "codec")
    with pytest.raises(CheckpointError, match="do not belong together"):
        UniComPipeline.from_pretrained(tmp_path / "one")


def test_folders_without_a_model_say_what_to_name(config, tmp_path):
    with pytest.raises(CheckpointError, match="holds no model"):
        UniComPipeline.from_pretrained(tmp_path)
    (tmp_path / "runs" / "tiny" / "weights" / "codec" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no finished codec stage"):
        UniComPipeline.from_pretrained(config.run_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("latent_in.weight"), "missing latent_in.weight"),
        (lambda t: t.update(stray=torch.zeros(1)), "unexpected stray"),
        (lambda t: t.update({"latent_in.bias": torch.zeros(3)}), "latent_in.bias is \\[3\\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(config, change, message):
    folder = find_parts(config.run_dir).prior
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        UniComPipeline.from_pretrained(config.run_dir)


def test_truncated_weights_are_a_clear_error(config):
    path = find_parts(config.run_dir).codec / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        UniComPipeline.from_pretrained(config.run_dir)


@pytest.mark.parametrize("key", ["encoder_fingerprint", "latent_channels", "feature_channels"])
def test_codec_and_prior_of_different_runs_are_refused(config, key):
    path = find_parts(config.run_dir).prior / "config.json"
    content = json.loads(path.read_text())
    content[key] = "another" if key == "encoder_fingerprint" else content[key] + 1
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"belong together|do not fit"):
        UniComPipeline.from_pretrained(config.run_dir)


def test_a_config_of_something_else_is_refused(config):
    path = find_parts(config.run_dir).codec / "config.json"
    path.write_text(json.dumps({"hello": 1}))
    with pytest.raises(CheckpointError, match="does not describe a codec"):
        UniComPipeline.from_pretrained(config.run_dir)


def test_a_missing_tokenizer_is_named(config, tmp_path):
    (tmp_path / "assets").rename(tmp_path / "gone")
    with pytest.raises(DataError, match=r"tokenizer\.json does not exist"):
        UniComPipeline.from_pretrained(config.run_dir)


def test_pictures_of_the_same_weights_settings_and_prompts_are_not_drawn_again(config, tmp_path, capsys):
    folder, weights = tmp_path / "drawn", tmp_path / "runs" / "tiny" / "weights" / "sft" / "model.safetensors"

    def drawn(*arguments: str) -> bool:
        command = ["sample", config.run_dir, "a red circle", "cat", "--out", str(folder), "--skip-done", *arguments]
        assert run(command) == 0
        return "skipped" not in capsys.readouterr().out

    assert drawn("--steps", "1")
    assert sorted(path.name for path in folder.iterdir()) == [
        "000-a-red-circle.png", "001-cat.png", "drawn.json", "grid.png",
    ]  # fmt: skip
    assert not drawn("--steps", "1")
    assert drawn("--steps", "2")
    (folder / "001-cat.png").unlink()
    assert drawn("--steps", "2")
    changed = {name: tensor * 1.01 for name, tensor in load_file(weights).items()}
    save_file(changed, weights)
    assert drawn("--steps", "2")
    assert not drawn("--steps", "2")
    assert run(["sample", config.run_dir, "--reconstruct", "heldout", "--skip-done"]) == 2
