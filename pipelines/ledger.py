"""The ledger of a job: one JSON line per finished or failed shard, written by one process.

It lies in the output folder, so that an interrupted job knows what is finished. A line that was cut off by a crash is
ignored. While a job runs it holds a lock on the ledger: a second job on the same folder is refused.
"""

import fcntl
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from unicom_dist.config.errors import PreflightError
from unicom_dist.config.storage import write_failed

Entry = dict[str, Any]


def read_ledger(path: Path) -> dict[str, Entry]:
    """The newest `done` entry of each shard; empty if there is no ledger."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    done: dict[str, Entry] = {}
    for line in lines:
        try:
            entry = json.loads(line)
            if entry["state"] == "done":
                done[entry["shard"]] = entry
        except (ValueError, KeyError, TypeError):
            continue  # cut off by a crash; its shard is made again
    return done


class Ledger:
    """The open ledger of a running job. PreflightError: another job holds it, or it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise write_failed(path, error) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise PreflightError(
                f"another job is writing {path.parent}",
                f"it holds {path.name}; two writers would overwrite each other's shards",
                "wait for it, or stop it",
                "docs/data.md",
            ) from error
        self.done = read_ledger(path)
        if os.fstat(self._file).st_size and not path.read_bytes().endswith(b"\n"):
            os.write(self._file, b"\n")  # end a line that a crash cut off

    def add(self, shard: str, state: str, **values: Any) -> None:
        """Append an entry and flush it to the disk."""
        entry = {"shard": shard, "state": state, "time": round(time.time(), 3), **values}
        try:
            os.write(self._file, json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            os.fsync(self._file)
        except OSError as error:
            raise write_failed(self.path, error) from error
        if state == "done":
            self.done[shard] = entry

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
