"""The goals of a benchmark: printed, written as JSON, and met only if they were measured."""

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(("value", "shown"), [(2.0, "met"), (0.5, "MISSED"), (None, "not measured")])
def test_a_goal_counts_only_if_it_was_measured(
    value: float | None,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    common = importlib.import_module("common")
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    goals = [common.Goal("always", 1.0, 1.0), common.Goal("against a peer", value, 1.0)]
    assert common.publish("bench", ["what"], [["row"]], goals, {}) == (shown == "met")
    assert shown in capsys.readouterr().out
    written = json.loads((tmp_path / "bench.json").read_text())["goals"][1]
    assert (written["value"], written["met"]) == (value, shown == "met")
