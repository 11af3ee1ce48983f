"""Steps that went wrong are recorded with their samples, and left out as often as is allowed. One process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unicom_dist.config.errors import NonFiniteError
from unicom_dist.config.schema import SpikeConfig, StageConfig
from unicom_dist.objective.terms import LossTerm
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.train.spikes import Spikes

KEYS = [["a", "b"], ["c"]]


def spikes_of(folder: Path, **values: Any) -> Spikes:
    stage = StageConfig(name="sft", kind="prior", steps=9, spike=SpikeConfig(**values))
    return Spikes(str(folder), stage, Mesh(0, 1, torch.device("cpu")))


def recorded(folder: Path) -> list[dict[str, Any]]:
    path = folder / "logs" / "spikes-rank-00000.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def step(spikes: Spikes, number: int, norm: float, loss: float) -> None:
    """A step and, as the next one begins, its loss."""
    spikes.add({"flow": LossTerm(torch.tensor(loss * 4), 4, 2.0)}, {"flow": 8})
    spikes.finished(number, KEYS, norm)
    spikes.judge(spikes.take_loss())


def test_a_jump_of_norm_or_loss_is_recorded_with_medians_and_keys(tmp_path: Path) -> None:
    spikes = spikes_of(tmp_path, factor=3.0, window=3)
    for number, (norm, loss) in enumerate([(9.0, 9.0), (1.0, 2.0), (1.2, 2.0), (2.0, 2.0), (7.0, 2.0), (1.0, 50.0)]):
        step(spikes, number, norm, loss)
    first, second = recorded(tmp_path)
    assert first == {
        "stage": "sft", "step": 4, "kind": "norm", "norm": 7.0, "loss": 2.0,
        "median_norm": 1.2, "median_loss": 2.0, "keys": KEYS,
    }  # fmt: skip
    assert (second["step"], second["kind"], second["loss"]) == (5, "loss", 50.0)
    assert spikes.figures() == {"spikes/recorded": 2.0}


def test_nothing_is_recorded_unless_asked_for(tmp_path: Path) -> None:
    spikes = spikes_of(tmp_path, window=1)
    for number, norm in enumerate([1.0, 100.0, 1.0]):
        step(spikes, number, norm, norm)
    assert recorded(tmp_path) == []
    assert spikes.figures() == {}


def test_more_in_a_row_than_allowed_end_the_run_naming_the_samples(tmp_path: Path) -> None:
    spikes = spikes_of(tmp_path, skip=2)
    error = NonFiniteError("gradient norm = nan", "overflow")
    spikes.skip(0, KEYS, error)
    spikes.skip(1, KEYS, error)
    step(spikes, 2, 1.0, 1.0)  # the row is broken
    spikes.skip(3, KEYS, error)
    spikes.skip(4, KEYS, error)
    spikes.add({"flow": LossTerm(torch.tensor(float("nan")), 4, 1.0)}, {"flow": 4})
    with pytest.raises(NonFiniteError, match="step 5: gradient norm = nan in 3 steps in a row") as caught:
        spikes.skip(5, KEYS, error)
    assert "a, b, c" in str(caught.value)
    found = recorded(tmp_path)
    assert [entry["step"] for entry in found] == [0, 1, 3, 4, 5]
    assert found[-1] == {"stage": "sft", "step": 5, "kind": "nonfinite", "norm": None, "loss": None, "keys": KEYS}
    assert spikes.figures() == {"spikes/skipped": 5.0}


def test_by_default_the_first_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as caught:
        spikes_of(tmp_path).skip(7, KEYS, NonFiniteError("gradient norm = inf"))
    assert caught.value.what == "stage sft, step 7: gradient norm = inf"
