"""Sends a run directory to MLflow: a parent run for the pipeline, a nested run per stage.

What was sent is remembered in mlflow.json per tracking server: the byte offset in metrics.jsonl, run ids, sent files.
Every step may be repeated: runs are found again by an id that is saved before they exist, MLflow stores a metric of the
same key, step, time and value once, the offset moves only after the server has answered.
Imports mlflow: only the mirror process uses this module.
"""

import json
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

from unicom_dist.tracking.env import read_env
from unicom_dist.tracking.metrics import METRICS_FILE, NUMERIC_KINDS, Record
from unicom_dist.tracking.rundir import flatten, read_config, without_credentials
from unicom_dist.tracking.status import Status

STATE_FILE = "mlflow.json"
PARENT = ""  # the stage name under which the parent run is kept
_CHUNK_BYTES = 1 << 20
_MAX_METRICS, _MAX_PARAMS, _MAX_VALUE = 1000, 100, 6000  # limits of one MLflow request
_END = {"done": "FINISHED", "failed": "FAILED", "preempted": "KILLED"}
_ROOT_FILES = ("config.yaml", "env.json", "eval.json", "report.html", "ablation.json", "ablation.html")


class MlflowRuns:
    """The MLflow side of one run directory. Methods may raise what mlflow raises; nothing is lost by calling again."""

    def __init__(self, run_dir: Path, uri: str, experiment: str) -> None:
        self._dir = run_dir
        self._uri = uri
        self._experiment = experiment
        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._state_path = run_dir / STATE_FILE
        self._key = without_credentials(uri)
        self._state = self._load()
        self._save()

    def send(self) -> bool:
        """Send the next part of metrics.jsonl and new files; whether everything there was is sent now."""
        try:
            self._run(PARENT)
            metrics_sent = self._send_metrics()
            self._send_files()
        except MlflowException as error:
            if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                self._state = _fresh_state()  # runs deleted on the server: everything is sent again
                self._save()
            raise
        return metrics_sent

    def finish(self, status: Status) -> None:
        """Close the runs with the state of the pipeline."""
        for stage in self._state["runs"]:
            if stage != PARENT and stage not in self._state["ended"]:
                self._close(stage, _END[status.state])
        self._close(PARENT, _END[status.state])

    def _close(self, stage: str, end: str) -> None:
        if self._state["ended"].get(stage) == end:
            return
        self._client.set_terminated(self._run(stage), status=end, end_time=self._state["last_time"].get(stage))
        self._state["ended"][stage] = end
        self._save()

    def _reopen(self, stage: str) -> None:
        if self._state["ended"].pop(stage, None) is not None:
            self._client.update_run(self._run(stage), status="RUNNING")
            self._save()

    def _run(self, stage: str, start_time_ms: int | None = None) -> str:
        runs: dict[str, str] = self._state["runs"]
        if stage in runs:
            return runs[stage]
        experiment_id = self._experiment_id()
        tags = {"unicom.uid": self._state["uid"], "unicom.stage": stage or "pipeline"}
        query = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = self._client.search_runs([experiment_id], filter_string=query, max_results=1)
        if found:
            runs[stage] = found[0].info.run_id
        else:
            if stage != PARENT:
                tags["mlflow.parentRunId"] = self._run(PARENT)
            name = stage or self._dir.name
            run = self._client.create_run(experiment_id, start_time=start_time_ms, tags=tags, run_name=name)
            runs[stage] = run.info.run_id
        self._describe(stage, runs[stage])
        self._save()
        return runs[stage]

    def _describe(self, stage: str, run_id: str) -> None:
        config, env = read_config(self._dir).values, read_env(self._dir)
        if stage != PARENT:
            stages = [section for section in config.get("stages", []) if section.get("name") == stage]
            config = stages[0] if stages else {}
        params = [Param(_name(key), _text(value)) for key, value in flatten(config).items()]
        tags = [RunTag("unicom.commit", env.get("commit", "")), RunTag("unicom.host", env.get("host", ""))]
        for first in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(run_id, params=params[first : first + _MAX_PARAMS])
        self._client.log_batch(run_id, tags=[tag for tag in tags if tag.value])

    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        if found is None:
            location = None
            if self._uri.startswith("sqlite:"):
                # Without a server MLflow would put artifacts under the current folder, wherever that is.
                database = Path(self._uri.removeprefix("sqlite:///"))
                location = (database.parent / "mlartifacts").resolve().as_uri()
            try:
                return str(self._client.create_experiment(self._experiment, artifact_location=location))
            except MlflowException:  # another run was faster
                found = self._client.get_experiment_by_name(self._experiment)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _send_metrics(self) -> bool:
        path = self._dir / METRICS_FILE
        if not path.is_file():
            return True
        offset = self._state["offset"]
        if path.stat().st_size < offset:
            offset = self._state["offset"] = 0  # replaced by a new file
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(_CHUNK_BYTES)
        data = data[: data.rfind(b"\n") + 1]  # whole lines only
        if not data:
            return True
        batches: dict[str, list[Metric]] = {}
        for record in _records(data):
            stage, at_ms = record.stage, int(record.time * 1000)
            self._run(stage, at_ms)
            self._reopen(stage)
            self._reopen(PARENT)
            self._state["last_time"][stage] = self._state["last_time"][PARENT] = at_ms
            if record.kind in NUMERIC_KINDS:
                batches.setdefault(stage, []).extend(_metrics(record, at_ms))
            elif record.kind == "params":
                self._add_params(stage, record.values)
            elif record.kind == "stage" and record.values.get("state") in _END:
                self._send_batches(batches)
                self._close(stage, _END[record.values["state"]])
        self._send_batches(batches)
        self._state["offset"] = offset + len(data)
        self._save()
        return bool(path.stat().st_size == self._state["offset"])

    def _add_params(self, stage: str, values: dict[str, Any]) -> None:
        """Parameters found out while the stage ran. MLflow's never change: the first start of a stage names them."""
        run_id = self._run(stage)
        known = self._client.get_run(run_id).data.params
        new = [Param(_name(key), _text(value)) for key, value in values.items() if _name(key) not in known]
        self._client.log_batch(run_id, params=new)

    def _send_batches(self, batches: dict[str, list[Metric]]) -> None:
        for stage, metrics in batches.items():
            for first in range(0, len(metrics), _MAX_METRICS):
                self._client.log_batch(self._run(stage), metrics=metrics[first : first + _MAX_METRICS])
        batches.clear()

    def _send_files(self) -> None:
        stages = {section.get("name") for section in read_config(self._dir).values.get("stages", [])}
        for path in self._files():
            name = str(path.relative_to(self._dir))
            stat = path.stat()
            mark = [stat.st_size, stat.st_mtime_ns]
            if self._state["files"].get(name) == mark:
                continue
            folder = path.parent.name
            stage = folder if folder in stages else PARENT  # pictures of an evaluation belong to the whole run
            under = "samples" if path.parent != self._dir else None
            self._client.log_artifact(self._run(stage), str(path), under)
            self._state["files"][name] = mark
            self._save()

    def _files(self) -> Iterator[Path]:
        yield from (path for name in _ROOT_FILES if (path := self._dir / name).is_file())
        samples = self._dir / "samples"
        yield from sorted(p for p in samples.rglob("*") if p.suffix in (".png", ".json") and p.is_file())

    def _load(self) -> dict[str, Any]:
        try:
            state = json.loads(self._state_path.read_text(encoding="utf-8"))["targets"][self._key]
        except (OSError, ValueError, KeyError, TypeError):
            return _fresh_state()
        return {**_fresh_state(), **state}

    def _save(self) -> None:
        try:
            targets = json.loads(self._state_path.read_text(encoding="utf-8"))["targets"]
        except (OSError, ValueError, KeyError, TypeError):
            targets = {}
        targets[self._key] = self._state
        temporary = self._state_path.with_name(f".{STATE_FILE}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"targets": targets}, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self._state_path)


def _fresh_state() -> dict[str, Any]:
    return {"uid": uuid.uuid4().hex, "runs": {}, "offset": 0, "files": {}, "ended": {}, "last_time": {}}


def _records(data: bytes) -> Iterator[Record]:
    for line in data.split(b"\n"):
        try:
            yield Record.from_json(line)
        except ValueError:
            continue  # a line torn by a crash


def _metrics(record: Record, at_ms: int) -> list[Metric]:
    return [
        Metric(_name(f"{record.kind}/{name}"), float(value), at_ms, record.step)
        for name, value in record.values.items()
        if isinstance(value, int | float)
    ]


def _name(key: str) -> str:
    """MLflow allows letters, digits and _-.: /."""
    return re.sub(r"[^\w\-.: /]", "_", key, flags=re.ASCII)[:250]


def _text(value: Any) -> str:
    return str(value)[:_MAX_VALUE]
