"""A loss or a gradient that is not finite on one rank alone: all leave the same steps out and go on. 2 gloo ranks."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import configure, mesh_of
from torch import Tensor
from training_run import StopAfter

from unicom_dist.config.errors import NonFiniteError
from unicom_dist.config.schema import Config, Mixture, SpikeConfig
from unicom_dist.objective.terms import LossTerm
from unicom_dist.testing.distributed import run_ranks
from unicom_dist.tracking.metrics import read_metrics
from unicom_dist.train.callbacks import Observer
from unicom_dist.train.loop import Run, start_run, train_step
from unicom_dist.train.watchdog import Watchdog

pytestmark = pytest.mark.dist
WORLD, STEPS = 2, 9
# (step, rank) of what goes wrong. One step in a row is left out, so the second of the last two ends the run.
LOSS, GRADIENT = {(1, 1), (6, 0), (7, 1)}, {(3, 0)}
LEFT_OUT = [1, 3, 6, 7]


def recipe(folder: Path, zero_stage: int) -> Config:
    """Pictures alone are drawn, so that every micro-batch of every rank has a gradient of the flow head."""
    config = configure(folder, "sft", zero_stage, WORLD)
    changes = {"steps": STEPS, "mixture": Mixture(text_to_image=1), "spike": SpikeConfig(skip=1), "log_every": 1}
    stages = [s.model_copy(update=changes) if s.name == "sft" else s for s in config.stages]
    return config.model_copy(update={"stages": stages})


def poison(run: Run) -> None:
    """Let the steps of `LOSS` and `GRADIENT` go wrong on this rank; of the gradient, a single element."""
    compute, rank = run.task.terms, run.mesh.rank

    def terms(outputs: Any, batch: Any) -> Mapping[str, LossTerm]:
        found = compute(outputs, batch)
        if (run.step, rank) in LOSS:
            return {name: replace(term, sum=term.sum * math.nan) for name, term in found.items()}
        return found

    def last_element(gradient: Tensor) -> Tensor | None:
        if (run.step, rank) not in GRADIENT:
            return None
        gradient = gradient.clone()
        gradient.view(-1)[-1] = math.inf  # under ZeRO-3 in the shard of the other rank
        return gradient

    run.task.terms = terms  # type: ignore[method-assign]
    run.engine.module.get_parameter("flow_head.out.weight").register_hook(last_element)


def states(run: Run) -> list[Tensor]:
    """Copies of this rank's weights, moments and averages."""
    return [buffer.clone() for buffers in (*run.engine.state().values(), run.ema.buffers) for buffer in buffers]


def look(run: Run) -> list[float]:
    """What the model says of the same batch on every rank, which under ZeRO-3 gathers its weights for it."""
    _, batch = next(iter(run.task.heldout()))
    with torch.no_grad():
        text, velocity = run.engine(batch)[:2]
    return [float(text.sum()), *velocity.flatten().tolist()]


def train(rank: int, world: int, folder: str, zero_stage: int) -> dict[str, Any]:
    """All steps until the error, and what was there after each. Module level: ranks import it."""
    config = recipe(Path(folder), zero_stage)
    stage, done = config.stage("sft"), []
    run = start_run(config, stage, mesh_of(config, "sft"), StopAfter(0), Watchdog())
    poison(run)
    ended = ""
    with run.store, Observer(run, None) as observer:
        while run.step < stage.steps and not ended:
            before, step = states(run), run.step
            try:
                train_step(run, observer)
            except NonFiniteError as error:
                ended = error.what
            moved = [not torch.equal(a, b) for a, b in zip(before, states(run), strict=True) if a.numel()]
            done.append((step, any(moved), run.engine.steps_done, run.ema.updates, look(run)))
    run.loader.close()
    run.engine.close()
    return {"done": done, "ended": ended}


@pytest.fixture(scope="module", params=[0, 3], ids=["plain", "ZeRO-3"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, list[Any]]:
    folder = tmp_path_factory.mktemp("spikes")
    config = recipe(folder, request.param)
    return config, run_ranks(train, WORLD, str(folder), request.param, timeout_s=200)


def test_all_ranks_leave_out_the_same_steps_and_go_on_alike(trained: tuple[Config, list[Any]]) -> None:
    _, (first, second) = trained
    assert first == second  # weights by what the model says, counters, and how it ended
    steps, moved, applied, averaged, outputs = zip(*first["done"], strict=True)
    assert steps == tuple(range(8))
    assert [step for step, any_moved in enumerate(moved) if not any_moved] == LEFT_OUT
    assert applied == averaged == (1, 1, 2, 2, 3, 4, 4, 4)
    assert all(math.isfinite(number) for look in outputs for number in look)
    assert "step 7: gradient norm = nan in 2 steps in a row" in first["ended"]


def test_every_rank_names_the_samples_of_its_own_replica(trained: tuple[Config, list[Any]]) -> None:
    config, _ = trained
    seen = []
    for rank in range(WORLD):
        lines = (Path(config.run_dir) / "logs" / f"spikes-rank-{rank:05d}.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        assert [(entry["step"], entry["kind"]) for entry in found] == [(step, "nonfinite") for step in LEFT_OUT]
        losses = {entry["step"]: entry["loss"] for entry in found}
        assert all((loss is None) == ((step, rank) in LOSS) for step, loss in losses.items())
        assert all(entry["keys"] and all(entry["keys"]) for entry in found)
        seen.append([entry["keys"] for entry in found])
    assert seen[0] != seen[1]


def test_metrics_are_those_of_the_steps_that_were_applied(trained: tuple[Config, list[Any]]) -> None:
    config, _ = trained
    records = [r for r in read_metrics(config.run_dir) if r.stage == "sft" and r.kind == "train"]
    assert [record.step for record in records] == [1, 3, 5, 6]
    assert all(math.isfinite(record.values["loss/total"]) for record in records)
    assert records[-1].values["spikes/skipped"] == 2
