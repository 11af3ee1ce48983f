"""The console line on a terminal and elsewhere, and its estimate of the time left. One process, seconds."""

import io

import pytest
from rich.console import Console

from unicom_dist.tracking.console import Eta, StageConsole, format_count, format_duration, format_values

VALUES = {
    "loss/total": 5.0, "loss/text": 3.25, "loss/flow": 0.5, "loss/flow@0.5": 0.4, "tokens_per_s": 1234.0,
    "latents_per_s": 45678.0, "mfu": 0.231, "data_wait_s": 0.002, "step_s": 0.1, "lr": 1e-3,
}  # fmt: skip


def test_line_has_losses_rates_mfu_and_data_wait() -> None:
    line = format_values(VALUES)
    assert line == "total 5  text 3.25  flow 0.5  1.23k tok/s  45.7k lat/s  MFU 23.1 %  data wait 2 %"


def test_without_a_terminal_a_plain_line_per_update() -> None:
    output = io.StringIO()
    with StageConsole(
        "pretrain", 30, position="4/6", console=Console(file=output, width=60), min_interval_s=0
    ) as console:
        console.update(1)
        console.update(10, VALUES)
        console.note("held-out [flow] 0.5")
        console.update(30, VALUES)
    lines = output.getvalue().splitlines()
    assert "\x1b" not in output.getvalue()
    assert len(lines) == 4
    assert lines[0].startswith("pretrain 4/6  10/30  total 5")
    assert "ETA" in lines[0]
    assert lines[1].strip() == "held-out [flow] 0.5"
    assert lines[3].strip().startswith("30 steps in")


def test_plain_lines_keep_their_distance_and_the_last_is_shown() -> None:
    output = io.StringIO()
    with StageConsole("codec", 50, console=Console(file=output, width=200), min_interval_s=3600) as console:
        for step in range(1, 51):
            console.update(step, VALUES)
    steps = [line.split()[1] for line in output.getvalue().splitlines() if "ETA" in line]
    assert steps == ["1/50", "50/50"]


def test_on_a_terminal_the_bar_goes_and_one_summary_stays() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100)
    with StageConsole("codec", 20, console=console) as stage:
        stage.update(20, VALUES)
    assert "20/20  total 5" in output.getvalue()
    assert output.getvalue().rstrip().endswith("20 steps in 0:00")


def test_time_left_follows_the_recent_pace() -> None:
    eta = Eta(start_step=100, total_steps=1100, horizon=10)
    eta._at_s = 0.0
    assert eta.remaining_s != eta.remaining_s
    for step in range(101, 201):
        eta.update(step, now_s=(step - 100) * 2.0)
    assert eta.remaining_s == pytest.approx(900 * 2.0)
    for step in range(201, 301):
        eta.update(step, now_s=200 + (step - 200) * 1.0)
    assert eta.remaining_s == pytest.approx(800 * 1.0, rel=1e-3)


def test_numbers_are_short() -> None:
    assert [format_count(n) for n in (0, 12.345, 1234, 1.5e6, 2e9)] == ["0", "12.3", "1.23k", "1.5M", "2G"]
    assert [format_duration(s) for s in (5, 75, 3675, float("nan"))] == ["0:05", "1:15", "1:01:15", "-"]
