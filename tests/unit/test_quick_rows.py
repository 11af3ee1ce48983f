"""Rows of the quick evaluation. One process, milliseconds."""

import io
import json

import pytest
from rich.console import Console

from unicom_dist.evaluate.rows import measure, table


@pytest.mark.parametrize(("better", "baseline", "beaten"), [("higher", 0.5, True), ("higher", 0.9, False),
                                                            ("lower", 0.5, False), ("lower", 1.5, True)])  # fmt: skip
def test_a_baseline_is_beaten_only_by_the_whole_interval(better, baseline, beaten):
    row = measure("m", "heldout", [0.8, 1.0, 1.2], better, untrained=baseline)
    assert row.value == pytest.approx(1.0)
    assert row.ci[0] < 1.0 < row.ci[1]
    assert row.beats_all is beaten
    assert measure("m", "heldout", [0.8, 1.0, 1.2], better, untrained=row.ci[0] + 1e-6).beats_all is False


def test_rows_become_plain_json():
    row = measure("psnr_db", "heldout", [20.0, 22.0], "higher", untrained=5.0, trivial=("mean image", 10.0))
    content = json.loads(json.dumps(row.as_dict()))
    assert content["value"] == 21.0
    assert content["n"] == 2
    assert content["baselines"] == {"untrained": 5.0, "trivial": {"name": "mean image", "value": 10.0}}
    assert len(content["ci"]) == 2


def test_table_shows_every_figure_with_its_baselines():
    rows = [measure("lpips", "heldout", [0.25, 0.25], "lower", untrained=0.75, trivial=("mean image", 0.5))]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(rows, "quick"))
    text = console.export_text()
    for part in ("lpips ↓", "0.250", "0.750", "0.500 (mean image)", "heldout"):
        assert part in text
