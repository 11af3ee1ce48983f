"""A tiny codec ablation end to end: stopped after its first training, continued, skipped; one with a resampler.

Starts the ranks three times.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from training_run import tiny_run

from unicom_dist.config.errors import ConfigError, Preempted
from unicom_dist.config.load import Loaded
from unicom_dist.evaluate.ruler import Ruler
from unicom_dist.tracking.metrics import read_metrics
from unicom_dist.tracking.status import read_status
from unicom_dist.train.ablation import cells as cells_module
from unicom_dist.train.ablation import codec
from unicom_dist.train.ablation.frame import SHEET

CHEAP = Ruler(lambda a, b: (a - b).square().flatten(1).mean(1), None, None, torch.device("cpu"))
STEPS = 40


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    config = tiny_run(
        folder,
        ablation={"seeds": 1, "kinds": ["mlp"], "widths": [2], "spatial": [], "pictures": 3},
        stages={"codec": {"steps": STEPS, "eval_every": 20}},
    )
    loaded = Loaded(config, {}, folder)
    first, second = Path(config.run_dir) / "identity-12/seed-0", Path(config.run_dir) / "mlp-2/seed-0"

    def stop_after_the_first() -> None:
        while not (first / "weights/codec/config.json").is_file():
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=stop_after_the_first, daemon=True)
    watcher.start()
    stopped: list[str] = []
    with pytest.raises(Preempted):
        codec.run(loaded, stopped.append, CHEAP)
    status = read_status(config.run_dir)
    unfinished = not (second / "weights").exists()
    said: list[str] = []
    page = codec.run(loaded, said.append, CHEAP)
    return loaded, page, status, unfinished, said


def test_ctrl_c_leaves_what_is_finished_and_the_same_call_continues(finished):
    _, _, status, unfinished, said = finished
    assert status is not None
    assert status.state == "preempted"
    assert unfinished
    assert "identity-12-seed-0: finished before, skipped" in said
    assert any("1 of 2 trainings" in line for line in said)
    assert [line.partition(":")[0] for line in said if "PSNR" in line] == ["identity-12-seed-0", "mlp-2-seed-0"]


def test_the_result_has_every_training(finished):
    loaded, page, _, _, _ = finished
    folder = Path(loaded.config.run_dir)
    result = json.loads((folder / "ablation.json").read_text())
    assert [variant["name"] for variant in result["variants"]] == ["identity-12", "mlp-2"]
    assert (result["steps"], result["seeds"]) == (STEPS, [0])
    for variant, channels in zip(result["variants"], (12, 2), strict=True):
        assert (variant["tokens"], variant["channels"]) == (4, channels)
        assert variant["figures"]["PSNR"]["low"] < variant["figures"]["PSNR"]["mean"]
        assert [step for step, _ in variant["curves"]["loss/flow"]] == [20, STEPS]
    assert result["variants"][0]["against_whole"]["PSNR"] == {"mean": 0, "low": 0, "high": 0}
    assert result["variants"][0]["parameters"] == 0
    (claim,) = result["claims"]
    assert claim["findings"][0]["sentence"] in page.read_text()
    assert (folder / SHEET).is_file()
    status = read_status(folder)
    assert status is not None
    assert status.state == "done"
    weights = json.loads((folder / "mlp-2/seed-0/weights/codec/config.json").read_text())
    assert weights["codec"]["compressor"]["kind"] == "mlp"


def test_every_training_is_a_stage_of_the_ablations_journal(finished):
    loaded = finished[0]
    records = read_metrics(loaded.config.run_dir)
    for name in ("identity-12-seed-0", "mlp-2-seed-0"):
        of_training = [record for record in records if record.stage == name]
        assert of_training[-1].values == {"state": "done"}
        assert "PSNR" in of_training[-2].values
        assert {record.step for record in of_training if record.kind == "train"} == set(range(1, STEPS + 1))


def test_a_finished_ablation_only_writes_its_page_again(finished, monkeypatch):
    loaded, page, *_ = finished
    before = (Path(loaded.config.run_dir) / "metrics.jsonl").read_bytes()
    page.unlink()

    def refuse(*_):
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(cells_module, "launch", refuse)
    said: list[str] = []
    codec.run(loaded, said.append, CHEAP)
    assert len(said) == 2
    assert all("skipped" in line for line in said)
    assert page.is_file()
    assert (Path(loaded.config.run_dir) / "metrics.jsonl").read_bytes() == before


def test_other_settings_in_the_same_folder_are_refused(finished):
    loaded = finished[0]
    changed = loaded.config.model_copy(update={"codec": loaded.config.codec.model_copy(update={"timestep_shift": 2.0})})
    with pytest.raises(ConfigError, match=r"codec\.timestep_shift = 1\.0, the recipe now says 2\.0"):
        codec.run(Loaded(changed, {}, loaded.path), lambda line: None, CHEAP)


def test_mlflow_shows_a_nested_run_per_training(finished, tmp_path):
    from mlflow import MlflowClient

    from unicom_dist.tracking.mlflow_runs import MlflowRuns

    folder, uri = Path(finished[0].config.run_dir), f"sqlite:///{tmp_path / 'mlflow.db'}"
    while not MlflowRuns(folder, uri, "ablations").send():
        pass
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    found = client.search_runs([client.get_experiment_by_name("ablations").experiment_id])
    runs = {run.info.run_name: run for run in found}
    assert set(runs) == {folder.name, "identity-12-seed-0", "mlp-2-seed-0"}
    parent, nested = runs[folder.name], runs["mlp-2-seed-0"]
    assert nested.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert nested.data.params["codec.compressor.kind"] == "mlp"
    assert nested.data.params["seed"] == "0"
    measured = json.loads((folder / "mlp-2/seed-0/measured.json").read_text())["values"]["PSNR"]
    assert nested.data.metrics["eval/PSNR"] == pytest.approx(sum(measured) / len(measured))
    names = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"ablation.html", "ablation.json", "samples"} <= names


def test_a_learned_resampler_stands_beside_pooling_and_all_tokens(tmp_path):
    config = tiny_run(
        tmp_path,
        ablation={"seeds": 1, "kinds": ["attention"], "widths": [2], "spatial": ["pool", "resampler"], "pictures": 2},
        stages={"codec": {"steps": 4, "eval_every": 2}},
    )
    page = codec.run(Loaded(config, {}, tmp_path), lambda line: None, CHEAP)
    result = json.loads((Path(config.run_dir) / "ablation.json").read_text())
    shapes = {variant["name"]: (variant["tokens"], variant["channels"]) for variant in result["variants"]}
    assert shapes == {
        "identity-12": (4, 12),
        "identity-pool-12": (1, 12),
        "identity-resampler-12": (1, 12),
        "attention-2": (4, 2),
        "attention-pool-8": (1, 8),
        "attention-resampler-8": (1, 8),
    }
    said = [finding["sentence"] for claim in result["claims"] for finding in claim["findings"]]
    assert any("resampled" in sentence and sentence in page.read_text() for sentence in said)
    curves = {variant["name"]: variant["curves"]["loss/flow"] for variant in result["variants"]}
    assert curves["identity-resampler-12"] != curves["identity-pool-12"]  # alike, but for what a query reads
