"""The mirror against the real MLflow on a sqlite file, against a server that is not there, and beside a living run.

Starts processes that import mlflow; about half a minute.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.exceptions import MlflowException
from PIL import Image

from unicom_dist.config.schema import TrackingConfig
from unicom_dist.tracking import report
from unicom_dist.tracking.env import write_env
from unicom_dist.tracking.metrics import MetricsWriter
from unicom_dist.tracking.mirror import start_mirror, sync, tracking_uri, ui_command
from unicom_dist.tracking.mlflow_runs import MlflowRuns
from unicom_dist.tracking.rundir import without_credentials
from unicom_dist.tracking.status import write_status


@pytest.fixture(autouse=True)
def _no_configured_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database MLflow has set up already (that takes seconds), without experiments of ours."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}", registry_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def run_dir(tmp_path: Path, empty_database: Path) -> Path:
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    shutil.copy(empty_database, folder.parent)
    config = {
        "name": "first",
        "stages": [{"name": "codec", "kind": "codec", "lr": 0.1}],
        "codec": {"perceptual": "none"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "origins": {"name": "here"}}))
    return folder


def log_steps(run_dir: Path, first: int, last: int, stage: str = "codec") -> None:
    with MetricsWriter(run_dir) as writer:
        for step in range(first, last + 1):
            writer.log(stage, step, {"loss/flow": 1 / step, "loss/flow@0.5": float("nan")})


def client(run_dir: Path) -> Any:
    from mlflow import MlflowClient

    uri = tracking_uri(run_dir, TrackingConfig())
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def run_ids(run_dir: Path) -> dict[str, str]:
    (target,) = json.loads((run_dir / "mlflow.json").read_text())["targets"].values()
    return dict(target["runs"])


def history(run_dir: Path, stage: str, key: str = "train/loss/flow") -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client(run_dir).get_metric_history(run_ids(run_dir)[stage], key)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "timed out"
        time.sleep(0.2)


def test_everything_arrives_once(run_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    log_steps(run_dir, 1, 30)
    samples = run_dir / "samples" / "codec"
    samples.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(samples / "step-000010.png")
    (run_dir / "samples" / "eval").mkdir()
    Image.new("RGB", (4, 4)).save(run_dir / "samples" / "eval" / "heldout-prompts.png")
    (run_dir / "eval.json").write_text("{}")
    write_status(run_dir, "done", exit_code=0)

    result = sync(run_dir)
    assert result.sent, result.message
    assert result.ui_command == f"mlflow ui --backend-store-uri sqlite:///{run_dir.parent}/mlflow.db --host 127.0.0.1"
    first = run_ids(run_dir)
    assert {client(run_dir).get_run(id_).info.status for id_ in first.values()} == {"FINISHED"}
    log_steps(run_dir, 31, 40)
    assert MlflowRuns(run_dir, tracking_uri(run_dir, TrackingConfig()), "unicom").send()

    assert run_ids(run_dir) == first
    assert history(run_dir, "codec") == [(step, 1 / step) for step in range(1, 41)]
    parent, stage = (client(run_dir).get_run(first[name]) for name in ("", "codec"))
    assert stage.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (parent.info.run_name, stage.info.run_name) == ("first", "codec")
    assert parent.data.params["stages.codec.lr"] == "0.1"
    assert parent.data.params["codec.perceptual"] == "none"
    assert stage.data.params == {"name": "codec", "kind": "codec", "lr": "0.1"}
    assert (parent.info.status, stage.info.status) == ("RUNNING", "RUNNING")  # new records opened them again
    names = {item.path for item in client(run_dir).list_artifacts(parent.info.run_id)}
    assert names == {"config.yaml", "eval.json", "samples"}
    assert [a.path for a in client(run_dir).list_artifacts(stage.info.run_id, "samples")] == ["samples/step-000010.png"]
    assert list(elsewhere.iterdir()) == []  # MLflow's own defaults would have put a database and a folder here


def test_a_crash_between_sending_and_remembering_sends_nothing_twice(run_dir: Path) -> None:
    uri = tracking_uri(run_dir, TrackingConfig())
    log_steps(run_dir, 1, 20)
    remembered = MlflowRuns(run_dir, uri, "unicom")
    state = (run_dir / "mlflow.json").read_text()  # the id is there, no run and no offset yet
    assert remembered.send()
    ids = run_ids(run_dir)
    (run_dir / "mlflow.json").write_text(state)
    assert MlflowRuns(run_dir, uri, "unicom").send()
    assert run_ids(run_dir) == ids
    assert history(run_dir, "codec") == [(step, 1 / step) for step in range(1, 21)]


def test_a_finished_stage_is_closed_and_keeps_the_first_value_of_a_parameter(run_dir: Path) -> None:
    log_steps(run_dir, 1, 2)
    with MetricsWriter(run_dir) as writer:
        for peak in (4e11, 5e11):  # measured again after a resume
            writer.log("codec", 2, {"mfu_peak_flops_per_s": peak, "mfu_peak_source": "measured"}, kind="params")
        writer.log("codec", 2, {"state": "done"}, kind="stage")
    assert MlflowRuns(run_dir, tracking_uri(run_dir, TrackingConfig()), "unicom").send()
    parent, stage = (client(run_dir).get_run(run_ids(run_dir)[name]) for name in ("", "codec"))
    assert (parent.info.status, stage.info.status) == ("RUNNING", "FINISHED")
    assert stage.data.params["mfu_peak_flops_per_s"] == "400000000000.0"
    assert stage.data.params["mfu_peak_source"] == "measured"


def test_half_a_line_waits_for_its_end(run_dir: Path) -> None:
    log_steps(run_dir, 1, 2)
    whole = (run_dir / "metrics.jsonl").read_bytes()
    (run_dir / "metrics.jsonl").write_bytes(whole[:-10])
    runs = MlflowRuns(run_dir, tracking_uri(run_dir, TrackingConfig()), "unicom")
    runs.send()
    assert [step for step, _ in history(run_dir, "codec")] == [1]
    (run_dir / "metrics.jsonl").write_bytes(whole)
    assert runs.send()
    assert [step for step, _ in history(run_dir, "codec")] == [1, 2]


def test_a_run_deleted_in_mlflow_is_sent_anew(run_dir: Path) -> None:
    log_steps(run_dir, 1, 3)
    uri = tracking_uri(run_dir, TrackingConfig())
    assert MlflowRuns(run_dir, uri, "unicom").send()
    (target,) = json.loads((run_dir / "mlflow.json").read_text())["targets"].values()
    target["runs"] = dict.fromkeys(target["runs"], "0" * 32)  # as after somebody removed them for good
    (run_dir / "mlflow.json").write_text(json.dumps({"targets": {uri: target}}))
    log_steps(run_dir, 4, 5)
    runs = MlflowRuns(run_dir, uri, "unicom")
    with pytest.raises(MlflowException, match="not found"):
        runs.send()
    assert runs.send()
    assert [step for step, _ in history(run_dir, "codec")] == [1, 2, 3, 4, 5]


def test_a_mirror_follows_a_run_to_its_end(run_dir: Path) -> None:
    write_status(run_dir, "preempted", exit_code=75)  # of an earlier start: it must not end this mirror
    mirror = start_mirror(run_dir, TrackingConfig())
    assert mirror is not None
    write_status(run_dir, "running")
    log_steps(run_dir, 1, 5)
    wait_for(lambda: (run_dir / "mlflow.json").is_file() and len(run_ids(run_dir)) == 2, 60)
    assert mirror.poll() is None
    log_steps(run_dir, 6, 8)
    write_status(run_dir, "done", exit_code=0)
    assert mirror.wait(60) == 0, (run_dir / "logs" / "mlflow.log").read_text()
    assert [step for step, _ in history(run_dir, "codec")] == list(range(1, 9))
    assert client(run_dir).get_run(run_ids(run_dir)[""]).info.status == "FINISHED"


def test_a_server_that_is_not_there_is_said_and_loses_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:s3cret@127.0.0.1:{port}")
    log_steps(run_dir, 1, 3)
    write_env(run_dir, [])
    result = sync(run_dir, timeout_s=8)
    assert not result.sent
    assert result.ui_command == ""
    assert f"127.0.0.1:{port}" in result.message
    report.run([str(run_dir)])
    written = [path.read_text() for path in run_dir.rglob("*") if path.is_file()]
    assert len(written) > 4
    assert "s3cret" not in result.message + "".join(written)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert sync(run_dir, TrackingConfig()).sent
    (runs,) = (
        t["runs"] for uri, t in json.loads((run_dir / "mlflow.json").read_text())["targets"].items() if "sql" in uri
    )
    assert len(runs) == 2


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_server_that_comes_late_gets_everything(run_dir: Path, tmp_path: Path) -> None:
    port = free_port()
    there = TrackingConfig(mlflow_uri=f"http://127.0.0.1:{port}")
    mirror = start_mirror(run_dir, there)
    assert mirror is not None
    write_status(run_dir, "running")
    log_steps(run_dir, 1, 5)
    wait_for(lambda: "MLflow at" in (run_dir / "logs" / "mlflow.log").read_text(), 60)
    store = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "files"),
    ]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    server = subprocess.Popen(
        [*command, *store], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        log_steps(run_dir, 6, 9)
        wait_for(lambda: len(run_ids(run_dir)) == 2, 200)
        write_status(run_dir, "done", exit_code=0)
        assert mirror.wait(60) == 0, (run_dir / "logs" / "mlflow.log").read_text()
        from mlflow import MlflowClient

        remote = MlflowClient(tracking_uri=there.mlflow_uri)
        steps = [m.step for m in remote.get_metric_history(run_ids(run_dir)["codec"], "train/loss/flow")]
        assert steps == list(range(1, 10))
        assert [a.path for a in remote.list_artifacts(run_ids(run_dir)[""])] == ["config.yaml"]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_switched_off_starts_nothing(run_dir: Path) -> None:
    off = TrackingConfig(mlflow=False)
    assert start_mirror(run_dir, off) is None
    assert not sync(run_dir, off).sent
    assert not (run_dir / "mlflow.json").exists()


def test_where_metrics_go(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri(run_dir, TrackingConfig()) == f"sqlite:///{run_dir.parent}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    assert tracking_uri(run_dir, TrackingConfig()) == "http://there:5000"
    assert tracking_uri(run_dir, TrackingConfig(mlflow_uri="sqlite:///x.db")) == "sqlite:///x.db"
    assert ui_command("http://there:5000") == ""
    assert "pw" not in ui_command("postgresql://me:pw@there/db")
    assert without_credentials("https://me:pw@there:5000/x") == "https://there:5000/x"
    assert without_credentials("https://me:p@w@there:5000/x, then") == "https://there:5000/x, then"
    assert without_credentials("sqlite:////a/b@c.db") == "sqlite:////a/b@c.db"
