"""The GPU training benchmark runs where there is no GPU, in its trial form; without that it says what is missing."""

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
    return importlib.import_module("bench_train")


def test_the_row_is_mix8k(bench: ModuleType) -> None:
    row = bench.packed(bench.ROWS["mix8k"], bench.SIZES["0.5B"], 0)
    assert row.num_positions == 8192
    parts = torch.cat([row.token_index, row.latent_index, row.feature_index])
    assert torch.equal(parts.sort().values, torch.arange(8192))
    assert round(bench.visible_pairs(row.segments) / 8192**2, 3) == 0.076
    assert round(len(row.label_ids) / 8192, 2) == 0.41


def test_trial_on_a_cpu(bench: ModuleType, tmp_path: Path) -> None:
    arguments = ["--size", "tiny", "--device", "cpu", "--plain", "--steps", "1", "--rounds", "1"]
    assert bench.main(arguments) == 0
    found = json.loads((tmp_path / "gpu_train_trial_on_cpu.json").read_text())
    assert [(row["row"], row["method"]) for row in found["figures"]["rows"]] == [
        ("mix8k", "plain"),
        ("text", "plain"),
        ("text", "transformers"),
    ]
    for row in found["figures"]["rows"]:
        assert row["flops"] > 0
        assert 0 < row["mfu_gemm"] < 1
        assert row["plan_total_bytes"] == sum(row["plan_bytes"].values())
    first = found["figures"]["first_loss_and_norm"]["tiny"]
    assert first["transformers"] == pytest.approx(first["ours"], rel=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_without_a_gpu(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 3
    assert capsys.readouterr().out.count("\n") == 1
