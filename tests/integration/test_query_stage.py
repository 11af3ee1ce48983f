"""Two query stages after a prior stage, on one rank: what starts where, what is sampled and resumed."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_run import StopAfter, tiny_run, write_stats

from unicom_dist.checkpoint.weights import read_weights_config
from unicom_dist.config.errors import Preempted
from unicom_dist.config.explain import write_config
from unicom_dist.config.schema import Config
from unicom_dist.data.manifest import Manifest
from unicom_dist.evaluate import quick
from unicom_dist.evaluate.heldout import to_unit
from unicom_dist.evaluate.quick import Networks
from unicom_dist.models.query_guided import OWN, QueryGuided
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.sample.loading import with_fingerprint
from unicom_dist.sample.pipeline import UniComPipeline
from unicom_dist.tracking.metrics import read_metrics
from unicom_dist.train.loop import train_stage
from unicom_dist.train.pipeline import run
from unicom_dist.train.watchdog import Watchdog

PRIOR = {
    "kind": "prior",
    "batch": 2,
    "row_positions": 128,
    "lr": 1e-3,
    "ema": 0.5,
    "precision": "float32",
    "log_every": 1,
    "mixture": {"text_to_image": 1},
}
GUIDE = {"enabled": True, "queries": 4, "connector_layers": 1, "decoder_layers": 1, "decoder_width": 32}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Config:
    stages = [
        {"name": "codec", "kind": "codec", "steps": 1, "batch": 4, "precision": "float32"},
        {"name": "latents", "kind": "latents"},
        # It reads alone, as alignment does in recipes: the flow head that no guide uses stays zero.
        {**PRIOR, "name": "pretrain", "steps": 2, "mixture": {"text_to_image": 0, "image_to_text": 1}},
        {**PRIOR, "name": "query", "steps": 4, "query": GUIDE},
        {**PRIOR, "name": "more", "steps": 1, "query": GUIDE},
    ]
    config = tiny_run(tmp_path_factory.mktemp("query"), 24, stages=stages)
    write_config(config.run_dir, config, {})
    run(config, with_latents)
    return config


def with_latents(config: Config, *_: object) -> None:
    """The latents that are there, as if this codec had made them."""
    write_stats(config)
    codec = Path(config.run_dir) / "weights" / "codec"
    for name in ("train", "heldout"):
        folder = Path(config.run_dir) / "latents" / name
        manifest = Manifest.read(folder, "latent")
        manifest.fingerprint = with_fingerprint(read_weights_config(codec), codec)["fingerprint"]
        manifest.write(folder)


def weights(config: Config, stage: str) -> dict[str, torch.Tensor]:
    return load_file(Path(config.run_dir) / "weights" / stage / "model.safetensors")


def test_the_transformer_stays_and_the_guide_goes_on_from_stage_to_stage(finished):
    before, query, more = (weights(finished, stage) for stage in ("pretrain", "query", "more"))
    own = {name for name in query if name.startswith(OWN)}
    assert query.keys() - own == before.keys()
    # The average of the stage before is not what the next one starts from; its last weights are.
    frozen = [name for name in before if torch.equal(query[name], more[name])]
    assert set(frozen) == before.keys()
    assert not any(torch.equal(query[name], more[name]) for name in own if "modulation" in name)
    assert read_weights_config(Path(finished.run_dir) / "weights" / "more")["query"] == GUIDE


def test_the_metrics_have_the_flow_of_the_guide_and_the_text_of_the_transformer(finished):
    records = [record for record in read_metrics(finished.run_dir) if record.stage == "query"]
    held_out = next(record for record in reversed(records) if record.kind == "eval")
    assert {"loss/flow@0.3", "loss/text"} <= held_out.values.keys()
    more = [record for record in read_metrics(finished.run_dir) if record.stage == "more" and record.kind == "eval"]
    assert more[-1].values["loss/text"] == held_out.values["loss/text"]
    assert more[-1].values["loss/flow@0.3"] != held_out.values["loss/flow@0.3"]


def test_a_guide_is_sampled_saved_and_read_as_any_prior(finished, tmp_path):
    pipeline = UniComPipeline.from_pretrained(finished.run_dir)
    assert isinstance(pipeline.prior.model, QueryGuided)
    drawn = pipeline(["a red circle", "a blue square"], [1, 2], 2, decoder_steps=1)
    assert len(drawn) == 2
    alone = pipeline.draw_latents(["a blue square"], [2], 2)[0].values
    together = pipeline.draw_latents(["a red circle", "a blue square"], [1, 2], 2)[1].values
    torch.testing.assert_close(alone, together)
    assert isinstance(pipeline.understand(drawn[0], 4), str)
    pipeline.save_pretrained(tmp_path / "model", torch.float32)
    again = UniComPipeline.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(again.draw_latents(["a blue square"], [2], 2)[0].values, alone)


def test_evaluation_draws_in_the_recipe_s_steps_and_the_untrained_prior_in_one(finished, tmp_path, monkeypatch):
    assert not any(weights(finished, "more")[f"flow_head.out.{name}"].any() for name in ("weight", "bias"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {finished.run_dir}/config.yaml\nsample: {{steps: 3, solver: euler}}\n")
    looks: dict[type, list[float]] = {QueryGuided: [], Transfusion: []}
    for kind in looks:

        def spied(model, prefix, z_t, t, grid, look=kind.velocity_from_prefix):
            looks[type(model)].append(t.max().item())
            return look(model, prefix, z_t, t, grid)

        monkeypatch.setattr(kind, "velocity_from_prefix", spied)
    cheap = Networks(lambda pictures: to_unit(pictures).flatten(1), lambda a, b: (a - b).square().flatten(1).mean(1))
    quick.run(finished.run_dir, cheap, recipe, tmp_path)
    drawings = looks[QueryGuided].count(0.0)
    assert drawings >= 2  # of prompts held out and trained on
    assert looks[QueryGuided] == pytest.approx([0, 1 / 3, 2 / 3] * drawings)
    assert looks[Transfusion] == [0.0] * drawings


def test_an_interrupted_stage_ends_bit_equal(finished, tmp_path):
    shutil.copytree(finished.run_dir, tmp_path / "run")
    for part in ("weights", "checkpoints"):
        for stage in ("query", "more"):
            shutil.rmtree(tmp_path / "run" / part / stage)
    config = finished.model_copy(update={"run_dir": str(tmp_path / "run")})
    torch.set_num_threads(config.parallel.threads)  # as the ranks do: sums of other lengths round differently
    mesh, stage = Mesh(0, 1, torch.device("cpu")), config.stage("query")
    with pytest.raises(Preempted):
        train_stage(config, stage, mesh, StopAfter(2), Watchdog(), None)
    train_stage(config, stage, mesh, StopAfter(0), Watchdog(), None)
    one, two = weights(finished, "query"), weights(config, "query")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
