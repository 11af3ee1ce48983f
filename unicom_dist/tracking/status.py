"""The file `status` of a run directory: what the run is doing, replaced atomically, so a reader never sees half of it.

States: running, done, failed, preempted (wrote a checkpoint, may be started again). `read_status` says "failed" for a
run that calls itself running although its process on this machine is gone.
"""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

State = Literal["running", "done", "failed", "preempted"]
STATUS_FILE = "status"


@dataclass(frozen=True)
class Status:
    """`step` counts optimizer steps of `stage`; `time` is unix seconds; `exit_code` is None while running."""

    state: State
    stage: str = ""
    step: int = 0
    pid: int = 0
    host: str = ""
    time: float = 0.0
    exit_code: int | None = None
    message: str = ""

    @property
    def final(self) -> bool:
        """Whether the process that wrote it has ended."""
        return self.state != "running"


def write_status(
    run_dir: str | Path,
    state: State,
    *,
    stage: str = "",
    step: int = 0,
    exit_code: int | None = None,
    message: str = "",
    pid: int | None = None,
) -> Status:
    """Replace the status file. OSError when the folder cannot be written.

    `pid` is by default this process, or its parent where that has called the run its own: ranks come and go, the
    process that started them lasts as long as the run.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    before = read_status(folder) if pid is None else None
    process = os.getpid() if pid is None else pid
    if before is not None and before.state == "running" and before.pid == os.getppid():
        process = before.pid
    status = Status(state, stage, step, process, socket.gethostname(), round(time.time(), 3), exit_code, message)
    temporary = folder / f".{STATUS_FILE}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(asdict(status)) + "\n", encoding="utf-8")
    os.replace(temporary, folder / STATUS_FILE)
    return status


def read_status(run_dir: str | Path, *, check_process: bool = True) -> Status | None:
    """The status as it is now, or as written with `check_process` off; None when there is none or it is damaged."""
    try:
        item = json.loads((Path(run_dir) / STATUS_FILE).read_text(encoding="utf-8"))
        status = Status(**{key: item[key] for key in Status.__dataclass_fields__ if key in item})
    except (OSError, ValueError, TypeError):
        return None
    if status.state not in get_args(State):
        return None
    if check_process and not status.final and status.host == socket.gethostname() and not process_alive(status.pid):
        return replace(status, state="failed", message=status.message or f"process {status.pid} ended without a word")
    return status


def process_alive(pid: int) -> bool:
    """Whether process `pid` of this machine is running (a killed one not yet waited for is not)."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True
