"""The GPU benchmark of the codec runs in miniature where there is no GPU; without that it says what is missing."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))
    monkeypatch.setattr(importlib.import_module("common"), "RESULTS", tmp_path)
    return importlib.import_module("bench_codec")


def test_a_trial_ends_with_figures_of_every_form(bench: ModuleType, tmp_path: Path) -> None:
    trial = ["--device", "cpu", "--px", "16", "--blocks", "1", "1", "--batch", "1", "--steps", "1", "--rounds", "1"]
    assert bench.main(trial) == 0
    rows = json.loads((tmp_path / "bench_codec.json").read_text())["figures"]["rows"]
    assert [row["trainable"] for row in rows] == ["lora", "all"]
    assert all(row["images_per_s"] > 0 and row["flops"] > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 3
    assert "torch sees no GPU" in capsys.readouterr().out
