"""metrics.jsonl: what a reader gets back, also after crashes, resumes and full disks. One process, seconds."""

import errno
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unicom_dist.tracking.metrics import METRICS_FILE, MetricsWriter, Record, read_metrics


def test_records_come_back_as_written(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.log("codec", 1, {"loss/flow": 0.5, "images": 3})
        writer.log("codec", 1, {"path": "samples/ä.png"}, kind="artifact")
    train, artifact = read_metrics(tmp_path)
    assert (train.stage, train.step, train.kind, train.values) == ("codec", 1, "train", {"loss/flow": 0.5, "images": 3})
    assert artifact.values == {"path": "samples/ä.png"}
    assert abs(train.time - time.time()) < 60


def test_lines_are_json_and_keep_values_that_are_not_finite(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.log("codec", 1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    text = (tmp_path / METRICS_FILE).read_text()
    assert '"NaN"' in text
    values = read_metrics(tmp_path)[0].values
    assert math.isnan(values["a"])
    assert (values["b"], values["c"]) == (math.inf, -math.inf)


def test_a_torn_line_is_dropped_and_the_next_start_writes_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text(Record("codec", 1, "train", {"x": 1.0}).to_json() + '\n{"time":3,"kind":"tr')
    assert [r.step for r in read_metrics(tmp_path)] == [1]
    with MetricsWriter(tmp_path) as writer:
        writer.log("codec", 2, {"x": 2.0})
    assert [r.step for r in read_metrics(tmp_path)] == [1, 2]


def test_a_resume_supersedes_later_steps_of_its_stage_only(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in (10, 20, 30):
            writer.log("codec", step, {"x": 1.0})
        writer.log("prior", 30, {"x": 1.0})
        writer.resumed("codec", 20)
        writer.log("codec", 25, {"x": 2.0})
    kept = [(r.stage, r.step) for r in read_metrics(tmp_path) if r.kind == "train"]
    assert kept == [("codec", 10), ("codec", 20), ("prior", 30), ("codec", 25)]


def test_logging_costs_the_caller_microseconds(tmp_path: Path) -> None:
    values = {f"name{i}": float(i) for i in range(12)}
    with MetricsWriter(tmp_path) as writer:
        costs = []
        for _ in range(20):
            start = time.thread_time()
            for step in range(100):
                writer.log("codec", step, values)
            costs.append((time.thread_time() - start) / 100)
    assert sorted(costs)[len(costs) // 2] < 30e-6
    assert len(read_metrics(tmp_path)) == 2000


def test_a_killed_process_keeps_what_was_flushed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from unicom_dist.tracking.metrics import MetricsWriter\n"
        "w = MetricsWriter(sys.argv[1])\n"
        "for i in range(50): w.log('codec', i, {'x': float(i)})\n"
        "w.flush(); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [r.step for r in read_metrics(tmp_path)] == list(range(50))


def test_records_survive_a_disk_that_is_full_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def partial(file: int, data: bytes) -> int:
        return write(file, data[:7])

    with MetricsWriter(tmp_path, interval_s=0.01) as writer:
        monkeypatch.setattr(os, "write", partial)
        writer.log("codec", 1, {"x": 1.0})
        writer.flush()
        monkeypatch.setattr(os, "write", lambda file, data: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        writer.log("codec", 2, {"x": 1.0})
        writer.flush()
        assert [r.step for r in read_metrics(tmp_path)] == [1]
        monkeypatch.setattr(os, "write", write)
        writer.log("codec", 3, {"x": 1.0})
    assert [r.step for r in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_value_that_is_no_number_costs_its_record_alone(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.log("codec", 1, {"x": [1, 2]})
        writer.log("codec", 2, {"x": 1.0})
    assert [r.step for r in read_metrics(tmp_path)] == [2]


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="kind must be one of"):
        writer.log("codec", 1, {}, kind="trian")  # type: ignore[arg-type]
