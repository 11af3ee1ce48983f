"""metrics.jsonl: the truth about a run, one JSON object a line, appended off the training step.

A record is {"time": unix seconds, "kind", "stage", "step", "values": {name: number or text}}. The same name under kind
"train" and kind "eval" is the same quantity on training and on held-out data. Names the console and the report know:
`loss/total`, `loss/<term>` (text, flow, perceptual; `loss/flow@0.5` = at fixed t 0.5), `lr`, `grad_norm`,
`tokens_per_s`, `latents_per_s`, `images_per_s`, `mfu` (share of 1), `step_s`, `data_wait_s` (per step), `pad_share`.
Any other name is recorded and drawn as well. One process writes (rank 0); any number read at the same time.
"""

import atexit
import json
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

log = logging.getLogger(__name__)

Kind = Literal["train", "eval", "system", "artifact", "stage", "params", "resume"]
Value = float | int | bool | str
METRICS_FILE = "metrics.jsonl"
NUMERIC_KINDS = ("train", "eval", "system")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class Record:
    """One line of metrics.jsonl. `step` counts optimizer steps within `stage`."""

    stage: str
    step: int
    kind: str
    values: dict[str, Any] = field(default_factory=dict)
    time: float = 0.0

    def to_json(self) -> str:
        """The line without its newline: valid JSON also where a value is not finite."""
        values = {name: _plain(value) for name, value in self.values.items()}
        line: dict[str, Any] = {"time": round(self.time, 3), "kind": self.kind, "stage": self.stage, "step": self.step}
        line["values"] = values
        return json.dumps(line, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str | bytes) -> "Record":
        """Parse a line; ValueError when it is torn or is not a record."""
        item = json.loads(line)
        try:
            values = dict(item["values"])
            kind = str(item["kind"])
            if kind in NUMERIC_KINDS:
                values = {k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in values.items()}
            return cls(str(item["stage"]), int(item["step"]), kind, values, float(item["time"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a metrics record: {error}") from error


def _plain(value: Any) -> Value:
    if isinstance(value, str | bool | int):
        return value
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else ("Infinity" if number > 0 else "-Infinity")


class MetricsWriter:
    """Appends records to `run_dir`/metrics.jsonl from a thread of its own.

    `log` only puts the record on a queue (about a microsecond); values become numbers and text in the thread. Lines
    reach the file every `interval_s` and on `flush` and `close`, each batch in one append, without fsync: a killed
    process loses at most the last interval, a crash of the machine what the system had not written. A write that
    fails (no space) is kept and tried again.
    """

    def __init__(self, run_dir: str | Path, interval_s: float = 0.5) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._interval_s = interval_s
        self._queue: queue.SimpleQueue[Record | threading.Event | None] = queue.SimpleQueue()
        self._hurry = threading.Event()
        self._closed = False
        self._warned = False
        self._pending = b"\n" if _ends_torn(self._file) else b""
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def log(self, stage: str, step: int, values: Mapping[str, Any], kind: Kind = "train") -> None:
        """Record `values` (name to number; text for artifact, stage and params) of one step.

        Returns at once; safe from any thread.
        """
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, got {kind!r}")
        self._queue.put(Record(stage, step, kind, dict(values), time.time()))

    def resumed(self, stage: str, step: int) -> None:
        """Say that `stage` continues from a checkpoint of `step`: readers drop what was recorded beyond it before."""
        self.log(stage, step, {}, "resume")

    def flush(self, timeout_s: float = 10.0) -> None:
        """Wait until everything logged so far is in the file (or `timeout_s` has passed)."""
        if self._closed:
            return
        done = threading.Event()
        self._queue.put(done)
        self._hurry.set()
        done.wait(timeout_s)

    def close(self) -> None:
        """Write what is left and stop the thread. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._hurry.set()
        self._thread.join(10.0)
        atexit.unregister(self.close)
        if self._pending:
            log.warning("%s: %d bytes of metrics could not be written", self.path, len(self._pending))
        os.close(self._file)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        stop = False
        while not stop:
            items = [self._queue.get()]  # sleeps without waking while nothing is logged
            self._hurry.wait(self._interval_s)
            self._hurry.clear()
            while not self._queue.empty():
                items.append(self._queue.get())
            lines = []
            for item in items:
                if isinstance(item, Record):
                    try:
                        lines.append(item.to_json() + "\n")
                    except (TypeError, ValueError) as error:
                        log.warning("metric record of step %d dropped: %s", item.step, error)
            self._append("".join(lines).encode())
            for item in items:
                if isinstance(item, threading.Event):
                    item.set()
            stop = None in items

    def _append(self, data: bytes) -> None:
        self._pending += data
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._file, self._pending) :]
        except OSError as error:
            if not self._warned:
                log.warning("%s cannot be written (%s); records are kept in memory and tried again", self.path, error)
                self._warned = True


def _ends_torn(file: int) -> bool:
    size = os.fstat(file).st_size
    return size > 0 and os.pread(file, 1, size - 1) != b"\n"


def read_metrics(run_dir: str | Path) -> list[Record]:
    """Records of a run in the order written, without torn lines and without what a resume superseded.

    A "resume" record of (stage, step) drops the earlier records of that stage with a larger step. [] without a file.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        return []
    records: list[Record] = []
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            record = Record.from_json(line)
        except ValueError:
            log.debug("%s: torn line skipped", path)
            continue
        if record.kind == "resume":
            records = [r for r in records if r.stage != record.stage or r.step <= record.step]
        records.append(record)
    return records
