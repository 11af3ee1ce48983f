"""A tiny pathway ablation end to end: stopped after its first training, continued, skipped."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from training_run import tiny_run

from pipelines import latents
from unicom_dist.config.errors import ConfigError, Preempted
from unicom_dist.config.load import Loaded, load_values
from unicom_dist.sample.pipeline import UniComPipeline
from unicom_dist.tracking.metrics import read_metrics
from unicom_dist.train.ablation import cells as cells_module
from unicom_dist.train.ablation import pathway
from unicom_dist.train.ablation.frame import SHEET

PRIOR = {"kind": "prior", "batch": 2, "row_positions": 128, "lr": 1e-3, "ema": 0.5, "precision": "float32"}
STAGES = [
    {"name": "codec", "kind": "codec", "steps": 2, "batch": 4, "precision": "float32"},
    {"name": "latents", "kind": "latents"},
    {**PRIOR, "name": "alignment", "steps": 2, "mixture": {"image_to_text": 1}},
    {
        **PRIOR,
        "name": "pretrain",
        "steps": 20,
        "mixture": {"text_to_image": 1},
        "eval_every": 10,
        "checkpoint_every": 10,
        "query": {"queries": 4, "connector_layers": 1, "decoder_layers": 1, "decoder_width": 32},
    },
]
NAMES = ["transfusion-4", "query-guided-4", "transfusion-12"]


def colours(pictures):
    """A judge: the mean colour of a picture, and a constant, so that no two are parallel."""
    return torch.tensor([[*np.asarray(p.convert("RGB")).mean((0, 1)), 64.0] for p in pictures])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    ablation = {"seeds": 1, "widths": [4], "pictures": 3}
    config = tiny_run(folder, 12, ablation=ablation, stages=STAGES)
    loaded = Loaded(config, {}, folder)
    first = Path(config.run_dir) / NAMES[0] / "seed-0"

    def stop_after_the_first() -> None:
        while not (first / "weights/pretrain/config.json").is_file():
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop_after_the_first, daemon=True).start()
    with pytest.raises(Preempted):
        pathway.run(loaded, latents.run, lambda line: None, colours)
    said: list[str] = []
    page = pathway.run(loaded, latents.run, said.append, colours)
    return loaded, page, said


def test_ctrl_c_leaves_what_is_finished_and_the_same_call_continues(finished):
    _, _, said = finished
    assert "transfusion-4-seed-0: finished before, skipped" in said
    assert any("2 of 3 trainings" in line for line in said)
    assert [line.partition("-seed")[0] for line in said if "prompt retrieval" in line] == NAMES


def test_arms_share_the_codec_of_their_width_and_differ_in_what_they_are_to(finished):
    folder = Path(finished[0].config.run_dir)
    for name, codec in zip(NAMES, ("codec-4", "codec-4", "codec-12"), strict=True):
        run = folder / name / "seed-0"
        assert (run / "weights/codec").resolve() == (folder / codec / "weights/codec").resolve()
        assert (run / "latents").resolve() == (folder / codec / "latents").resolve()
        assert UniComPipeline.from_pretrained(run).prior.content["step"] == 20
    one, two, three = (
        json.loads((folder / name / "seed-0/weights/pretrain/config.json").read_text()) for name in NAMES
    )
    assert (one["latent_channels"], two["latent_channels"], three["latent_channels"]) == (4, 4, 12)
    assert (one.get("query", {}).get("enabled", False), two["query"]["enabled"]) == (False, True)
    assert one["prior"]["timestep_shift"] == pytest.approx(three["prior"]["timestep_shift"] / 3**0.5, rel=1e-3)


def test_the_result_has_every_training_at_every_checkpoint(finished):
    loaded, page, _ = finished
    folder = Path(loaded.config.run_dir)
    result = json.loads((folder / "ablation.json").read_text())
    assert [variant["name"] for variant in result["variants"]] == NAMES
    assert (result["steps"], result["seeds"]) == ([10, 20], [0])
    for variant in result["variants"]:
        for table in variant["figures"].values():
            assert list(table) == ["10", "20"]
            assert all(0 <= estimate["mean"] <= 1 for estimate in table.values())
        assert [step for step, _ in variant["flow"]] == [10, 20]
    for claim in result["claims"]:
        assert claim["findings"][0]["sentence"] in page.read_text()
    measured = json.loads((folder / NAMES[1] / "seed-0/measured.json").read_text())
    own = json.loads((folder / NAMES[1] / "seed-0/weights/pretrain/config.json").read_text())
    assert own["query"]["queries"] == 4
    whole = UniComPipeline.from_pretrained(folder / NAMES[1] / "seed-0").prior.model
    assert measured["parameters"] == sum(p.numel() for p in whole.guide.parameters())
    assert (folder / SHEET).is_file()


def test_every_training_is_a_stage_of_the_ablations_journal(finished):
    records = read_metrics(finished[0].config.run_dir)
    for name in NAMES:
        of_training = [record for record in records if record.stage == f"{name}-seed-0"]
        assert of_training[-1].values == {"state": "done"}
        assert "prompt retrieval, held out at step 20" in of_training[-2].values


def test_a_finished_ablation_only_writes_its_page_again(finished, monkeypatch):
    loaded, page, _ = finished
    page.unlink()

    def refuse(*_):
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(cells_module, "launch", refuse)
    pathway.run(loaded, latents.run, lambda line: None, refuse)
    assert page.is_file()


def test_a_recipe_that_cannot_show_a_convergence_is_refused(finished):
    loaded = finished[0]
    values = loaded.config.model_dump(mode="json")
    fewer = load_values(values, ["stages.pretrain.checkpoint_every=5"])
    with pytest.raises(ConfigError, match="keep_checkpoints = 2 with 20 steps of pretrain and a checkpoint every 5"):
        pathway.run(fewer, latents.run, lambda line: None, colours)
    values["stages"] = [stage for stage in values["stages"] if stage["name"] != "alignment"]
    with pytest.raises(ConfigError, match="lacks a stage that the pathways need"):
        pathway.run(load_values(values), latents.run, lambda line: None, colours)
