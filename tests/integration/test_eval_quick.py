"""The quick suite on a run of untrained tiny models, with cheap judging networks. One process, some seconds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import latents
from unicom_dist.config.errors import ConfigError, DataError
from unicom_dist.config.explain import write_config
from unicom_dist.config.load import load_recipe
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.text import Vocabulary
from unicom_dist.evaluate import quick
from unicom_dist.evaluate.heldout import mean_picture, read_pairs, to_unit
from unicom_dist.evaluate.losses import flow_losses, linear_guess, unigram
from unicom_dist.evaluate.quick import Networks
from unicom_dist.evaluate.result import measured
from unicom_dist.models.encoders import encoder_fingerprint
from unicom_dist.models.encoders.random import CHANNELS
from unicom_dist.models.segments import PackedBatch
from unicom_dist.sample.loading import find_parts, load_prior
from unicom_dist.sample.pipeline import UniComPipeline
from unicom_dist.testing.shards import write_tiny_sets
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets
from unicom_dist.testing.tiny_run import write_tiny_weights

CHEAP = Networks(lambda pictures: to_unit(pictures).flatten(1), lambda a, b: (a - b).square().flatten(1).mean(1))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    write_tiny_assets(folder)
    config = tiny_config(folder)
    write_tiny_weights(config)
    write_tiny_sets(config, samples=20, heldout=6, feature_channels=CHANNELS, grids=((2, 2), (3, 2)))
    for name in ("train", "heldout"):
        manifest = Manifest.read(f"{config.data.path}/{name}", "random")
        manifest.fingerprint = encoder_fingerprint(config.encoder)
        manifest.write(f"{config.data.path}/{name}")
    latents.run(config)
    return config


@pytest.fixture(scope="module")
def result(config):
    rows = quick.run(config.run_dir, CHEAP)
    content = json.loads((find_parts(config.run_dir).codec.parents[1] / "eval.json").read_text())
    return rows, content


def test_every_figure_of_the_suite_is_there_with_its_baselines(result):
    rows, content = result
    assert content["suite"] == "quick"
    assert content["rows"] == [row.as_dict() for row in rows]
    found = {(row["metric"], row["split"]): row for row in content["rows"]}
    expected = [("PSNR (dB)", "heldout"), ("SSIM", "heldout"), ("LPIPS (VGG)", "heldout")]
    expected += [("flow loss", f"heldout, {stage}") for stage in ("alignment", "pretrain", "continue", "sft")]
    expected += [(f"flow loss, t = {t}", "heldout, sft") for t in (0.3, 0.7)]
    expected += [("caption loss (nats/token)", "heldout, sft")]
    judged = ("accuracy, top 1", "accuracy, top 5", "retrieval", "kind")
    expected += [(f"prompt {name}", f"{split} prompts") for name in judged for split in ("heldout", "train")]
    for key in expected:
        row = found.pop(key)
        assert row["baselines"]["untrained"] is not None, key
        assert row["baselines"]["trivial"]["name"] in ("mean image", "linear guess", "unigram", "chance"), key
        assert row["ci"][0] <= row["value"] <= row["ci"][1]
        assert row["n"] == 4
    assert {metric for metric, _ in found} == {f"judge on reconstructions, {name}" for name in judged}
    assert set(content["flow_loss"]) == {"alignment", "pretrain", "continue", "sft"}
    assert set(content["flow_loss"]["sft"]) == {"0.3", "0.7"}
    assert len(content["captions"]) == 6
    assert {"key", "truth", "generated"} <= content["captions"][0].keys()


def test_pictures_can_be_opened(config, result):
    folder = find_parts(config.run_dir).codec.parents[1] / "samples" / "eval"
    for name in ("reconstructions", "heldout-prompts", "train-prompts"):
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 128


def test_the_same_model_is_measured_the_same_again(config, result):
    before, _ = result
    again = quick.run(config.run_dir, CHEAP)
    assert [row.as_dict() for row in again] == [row.as_dict() for row in before]


def test_figures_of_the_same_weights_and_settings_are_kept(config, result, caplog, tmp_path):
    before, _ = result
    with caplog.at_level("INFO"):
        assert quick.run(config.run_dir, skip_done=True) == before  # no networks are given: nothing was measured
    assert "of these weights and settings, skipped" in caplog.text
    other = tmp_path / "other.yaml"
    other.write_text(f"base: {config.run_dir}/config.yaml\neval: {{images: 3}}\n")
    assert measured(Path(config.run_dir), load_recipe(other).config) != measured(Path(config.run_dir), config)


def test_untrained_flow_loss_is_that_of_predicting_zero(config, result):
    # A fresh flow head is zero, so the loss is the mean square of z1 - eps.
    rows, _ = result
    prior = load_prior(find_parts(config.run_dir).prior)
    from unicom_dist.data.loader import heldout_prior_batches

    batches = list(heldout_prior_batches(config, prior.vocabulary, prior.stats, 0.3, 4, tasks=("text_to_image",)))
    expected = torch.cat([(b.latents - b.noise).square().mean(1) for b in batches]).mean().item()
    row = next(row for row in rows if row.metric == "flow loss, t = 0.3")
    assert row.untrained == pytest.approx(expected, rel=1e-4)


def test_a_model_folder_is_measured_as_its_run_with_a_recipe_named(config, result, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    UniComPipeline.from_pretrained(config.run_dir).save_pretrained(model, torch.float32)
    with pytest.raises(ConfigError, match="is a model folder") as caught:
        quick.run(model, CHEAP)
    assert "--recipe" in caught.value.remedy
    moved = config.model_copy(update={"run_dir": str(tmp_path / "other")})  # a recipe whose run is not on this machine
    write_config(tmp_path, moved, {})
    rows = quick.run(model, CHEAP, recipe=tmp_path / "config.yaml", out=out)
    last = [row for row in result[0] if not row.split.startswith("heldout, ") or row.split.endswith("sft")]
    assert [row.as_dict() for row in rows] == [row.as_dict() for row in last]
    assert {path.name for path in out.iterdir()} == {"eval.json", "samples"}


def test_features_of_another_encoder_are_refused(config, result):
    manifest = Manifest.read(f"{config.data.path}/heldout", "random")
    manifest.model_copy(update={"fingerprint": "another"}).write(f"{config.data.path}/heldout")
    try:
        with pytest.raises(DataError, match="fingerprint another"):
            quick.run(config.run_dir, CHEAP)
    finally:
        manifest.write(f"{config.data.path}/heldout")


def test_missing_judge_is_named_before_anything_is_measured(config):
    with pytest.raises(ConfigError, match=r"eval\.judge_path"):
        quick.run(config.run_dir)


def test_a_run_with_a_codec_only_is_measured_that_far(config, tmp_path):
    weights = find_parts(config.run_dir).codec.parent
    hidden = [weights / name for name in ("alignment", "pretrain", "continue", "sft")]
    for path in hidden:
        path.rename(tmp_path / path.name)
    try:
        rows = quick.run(config.run_dir, CHEAP)
    finally:
        for path in hidden:
            (tmp_path / path.name).rename(path)
    assert [row.metric for row in rows] == ["PSNR (dB)", "SSIM", "LPIPS (VGG)"]


def normal_batch(t: float, count: int = 4000, channels: int = 8) -> PackedBatch:
    generator = torch.Generator().manual_seed(3)
    none, empty = torch.zeros(0, dtype=torch.long), torch.zeros(0, 2, dtype=torch.long)
    return PackedBatch(
        segments=[],
        rope_positions=none,
        token_ids=none,
        token_index=none,
        label_index=none,
        label_ids=none,
        latents=torch.randn(count, channels, generator=generator),
        noise=torch.randn(count, channels, generator=generator),
        t=torch.full((count,), t),
        flow_index=torch.arange(count),
        latent_index=none,
        latent_grid=empty,
        features=torch.zeros(0, 1),
        feature_index=none,
        feature_grid=empty,
        keys=["k"],
        tasks=["text_to_image"],
        sources=["train"],
        label_sample=none,
        latent_sample=torch.zeros(count, dtype=torch.long),
    )


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 0.9])
def test_linear_guess_is_the_best_for_data_without_structure(t):
    batch = normal_batch(t)
    best = flow_losses(linear_guess, [batch]).mean
    assert best == pytest.approx(2 - (2 * t - 1) ** 2 / (t**2 + (1 - t) ** 2), rel=0.02)
    z_t = t * batch.latents + (1 - t) * batch.noise
    for change in (-0.2, 0.2):
        assert best < flow_losses(lambda b, change=change: linear_guess(b) + change * z_t, [batch]).mean


def test_unigram_knows_the_frequencies_of_the_training_captions(config):
    vocabulary = Vocabulary.full(config.prior.tokenizer)
    log_frequency = unigram(config, vocabulary)
    assert log_frequency.exp().sum().item() == pytest.approx(1.0, rel=1e-4)
    colour = vocabulary.encode(" circle")[-1]
    assert log_frequency[colour] > log_frequency[vocabulary.control["<|image_pad|>"]]
    assert log_frequency.argmax() in (vocabulary.control["<|im_end|>"], vocabulary.encode("a")[0])


def test_mean_picture_is_the_average(config):
    pairs = read_pairs(config, "heldout", encoder_fingerprint(config.encoder))
    expected = np.mean([np.asarray(pair.picture, float) for pair in pairs], 0)
    assert np.abs(np.asarray(mean_picture(pairs)) - expected).max() <= 0.5
