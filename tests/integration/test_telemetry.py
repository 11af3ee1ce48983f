"""What a stage records of its steps: losses taken apart, two kinds of weights, steps left out. One process, seconds."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import configure
from training_run import tiny_run

from unicom_dist.config.schema import Config
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.parallel.plain import PlainEngine
from unicom_dist.tracking.metrics import Record, read_metrics
from unicom_dist.train.loop import train_stage
from unicom_dist.train.signals import StopRequest
from unicom_dist.train.watchdog import Watchdog


def train(config: Config, stage: str) -> list[Record]:
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    mesh = Mesh(0, 1, torch.device("cpu"))
    train_stage(config, config.stage(stage), mesh, StopRequest(), Watchdog(), None)
    return [record for record in read_metrics(config.run_dir) if record.stage == stage]


def test_a_prior_records_its_losses_by_task_and_time_and_those_of_both_weights(tmp_path: Path) -> None:
    config = configure(tmp_path, "pretrain", 0, 1)
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"raw_weights": True})})
    records = train(config, "pretrain")
    first = next(record.values for record in records if record.kind == "train")
    assert first["loss_by_task/flow/text_to_image"] == pytest.approx(first["loss/flow"], rel=1e-5)
    assert first["loss_by_ratio/flow/1:1"] == pytest.approx(first["loss/flow"], rel=1e-5)
    assert any(name.startswith("loss_by_t/flow/") for name in first)
    by_task = [value for name, value in first.items() if name.startswith("loss_by_task/text/")]
    assert min(by_task) <= first["loss/text"] <= max(by_task)
    assert abs(first["latents/mean"]) < 1
    assert 0 < first["latents/mean_square"] < 10
    held_out = next(record.values for record in records if record.kind == "eval")
    averaged = {name.partition("/")[2]: value for name, value in held_out.items() if name.startswith("loss/")}
    raw = {name.partition("/")[2]: value for name, value in held_out.items() if name.startswith("loss_raw/")}
    assert set(raw) == set(averaged)
    assert raw != averaged


def test_a_step_that_is_not_finite_is_left_out_where_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path, stages={"codec": {"spike": {"skip": 1}}})
    apply, seen = PlainEngine.step, list[tuple[int, Any]]()

    def broken(engine: PlainEngine, lr: float) -> float:
        seen.append((engine.steps_done, engine.state()["weight"][0].clone()))
        if len(seen) == 3:
            engine.gradients()[0].fill_(math.nan)
        return apply(engine, lr)

    monkeypatch.setattr(PlainEngine, "step", broken)
    records = [record for record in train(config, "codec") if record.kind == "train"]
    assert [done for done, _ in seen] == [0, 1, 2, 2]
    assert torch.equal(seen[2][1], seen[3][1])
    kept = json.loads((Path(config.run_dir) / "logs" / "spikes-rank-00000.jsonl").read_text())
    assert (kept["step"], kept["kind"], len(kept["keys"][0])) == (2, "nonfinite", config.stage("codec").batch)
    assert [record.step for record in records] == [1, 2, 4]
    assert all(math.isfinite(record.values["loss/total"]) for record in records)
    assert records[-1].values["spikes/skipped"] == 1
