"""The process that carries metrics.jsonl and pictures to MLflow while a run goes on, beside it and at low priority.

`start_mirror` starts `python -m unicom_dist.tracking.mirror RUN_DIR`; it polls, waits longer while MLflow does not
answer, and ends when the run has ended and everything is sent. What could not be sent by then is sent by `sync`
(`unicom report`) or by the next start of the run. Training never waits for any of it.
"""

import argparse
import contextlib
import fcntl
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.schema import TrackingConfig
from unicom_dist.tracking.rundir import CONFIG_FILE, read_config, without_credentials
from unicom_dist.tracking.status import Status, process_alive, read_status

log = logging.getLogger("unicom_dist.tracking.mirror")

_EXIT_SENT, _EXIT_NOT_SENT, _EXIT_BUSY = 0, 1, 3


@dataclass(frozen=True)
class SyncResult:
    """Whether everything is in MLflow, a sentence for the user, and the command that opens the UI ("" for a server)."""

    sent: bool
    message: str
    ui_command: str


def tracking_uri(run_dir: str | Path, tracking: TrackingConfig) -> str:
    """`tracking.mlflow_uri`, else MLFLOW_TRACKING_URI, else a sqlite file in the run directory's parent."""
    configured = tracking.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    return configured or f"sqlite:///{Path(run_dir).resolve().parent / 'mlflow.db'}"


def ui_command(uri: str) -> str:
    """The command that opens the MLflow UI of a local store on loopback; "" where a server shows its own."""
    if uri.startswith(("http://", "https://", "databricks")):
        return ""
    return f"mlflow ui --backend-store-uri {shlex.quote(without_credentials(uri))} --host 127.0.0.1"


def read_tracking(run_dir: str | Path) -> TrackingConfig:
    """The `tracking` section of the run's config.yaml; the defaults where it has none. ConfigError: not valid."""
    section = read_config(run_dir).values.get("tracking", {})
    known = {key: value for key, value in section.items() if key in TrackingConfig.model_fields}
    try:
        return TrackingConfig(**known)
    except ValidationError as error:
        where = f"{Path(run_dir) / CONFIG_FILE}: section tracking"
        raise ConfigError(where, error.errors()[0]["msg"], "correct it there", "docs/tracking.md") from None


def start_mirror(run_dir: str | Path, tracking: TrackingConfig) -> subprocess.Popen[bytes] | None:
    """Start the mirror of a run; None when `tracking.mlflow` is off. Its log is logs/mlflow.log.

    Call it once per start, from the process that lasts as long as the run. It ends by itself when a final status is
    written after this call or this process has ended; do not wait for it.
    """
    if not tracking.mlflow:
        return None
    folder = Path(run_dir)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    with (folder / "logs" / "mlflow.log").open("ab") as output:
        # A session of its own: Ctrl-C ends the training, and then the mirror has still something to send.
        return subprocess.Popen(
            [*_command(folder, tracking), "--follow", str(os.getpid()), "--since", str(time.time())],
            env=_environment(folder, tracking),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def sync(run_dir: str | Path, tracking: TrackingConfig | None = None, timeout_s: float = 180.0) -> SyncResult:
    """Send what MLflow does not have yet, in a process of its own; never raises because of MLflow.

    Waits while a mirror of this run is at it. `tracking` defaults to what the run's config.yaml says.
    """
    folder = Path(run_dir)
    settings = tracking or read_tracking(folder)
    uri = tracking_uri(folder, settings)
    shown = without_credentials(uri)
    if not settings.mlflow:
        return SyncResult(False, "MLflow is switched off (tracking.mlflow = false)", "")
    command = [*_command(folder, settings), "--patience", str(timeout_s / 2)]
    try:
        done = subprocess.run(
            command, env=_environment(folder, settings), capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return SyncResult(False, f"MLflow at {shown} did not answer within {timeout_s:.0f} s", ui_command(uri))
    if done.returncode == _EXIT_SENT:
        return SyncResult(True, f"MLflow is up to date: {shown}", ui_command(uri))
    if done.returncode == _EXIT_BUSY:
        return SyncResult(False, "a mirror of this run is still sending to MLflow", ui_command(uri))
    lines = done.stderr.strip().splitlines()
    reason = without_credentials(lines[-1]) if lines else "no answer"
    return SyncResult(False, f"MLflow at {shown} is not up to date, run this again later: {reason}", ui_command(uri))


@dataclass(frozen=True)
class Follow:
    """A run to follow: process `pid` carries it out; a final status written before `since_s` is an earlier start's."""

    pid: int
    since_s: float

    def ended(self, status: Status | None) -> bool:
        """Whether nothing more is to come."""
        written = status is not None and status.final and status.time >= self.since_s
        return written or not process_alive(self.pid)


def mirror(run_dir: Path, uri: str, experiment: str, follow: Follow | None, poll_s: float, patience_s: float) -> int:
    """Send what there is; with `follow` go on until that run has ended. Returns the exit status of the process.

    Once nothing more is to come, it gives up when MLflow has not answered for `patience_s` seconds.
    """
    from unicom_dist.tracking.mlflow_runs import MlflowRuns

    runs: MlflowRuns | None = None
    wait_s, answered_s = poll_s, time.monotonic()
    while True:
        # Looked at before the metrics are: what was written before the end is then sent.
        ending = follow is None or follow.ended(read_status(run_dir, check_process=False))
        try:
            runs = runs or MlflowRuns(run_dir, uri, experiment)
            while not runs.send():
                pass
            if ending:
                status = read_status(run_dir)
                if status is not None and status.final:
                    runs.finish(status)
                return _EXIT_SENT
            wait_s, answered_s = poll_s, time.monotonic()
        except Exception as error:  # whatever MLflow and its clients raise: it is tried again
            text = without_credentials(" ".join(str(error).split()))
            log.warning("MLflow at %s: %s: %.300s", without_credentials(uri), type(error).__name__, text)
            if ending and time.monotonic() - answered_s > patience_s:
                return _EXIT_NOT_SENT
            wait_s = min(2 * wait_s, 5.0 if ending else 60.0)
        time.sleep(wait_s)


@contextlib.contextmanager
def _only_one(run_dir: Path, wait_s: float) -> Iterator[bool]:
    """Holds the lock of the run's mirror; False when another process has held it for `wait_s` seconds."""
    with (run_dir / ".mlflow.lock").open("a") as file:
        until = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > until:
                    yield False
                    return
                time.sleep(0.2)
        yield True


def _command(run_dir: Path, tracking: TrackingConfig) -> list[str]:
    module = "unicom_dist.tracking.mirror"
    return [sys.executable, "-m", module, str(run_dir.resolve()), "--experiment", tracking.experiment]


def _environment(run_dir: Path, tracking: TrackingConfig) -> dict[str, str]:
    """The address goes by the environment: it may hold a password, and arguments are public on a machine."""
    short = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "GIT_PYTHON_REFRESH": "quiet"}
    return {**short, **os.environ, **quiet, "MLFLOW_TRACKING_URI": tracking_uri(run_dir, tracking)}


def main(arguments: list[str] | None = None) -> int:
    """Entry of the mirror process; the address of MLflow is in MLFLOW_TRACKING_URI."""
    parser = argparse.ArgumentParser(description="Carry a run's metrics and pictures to MLflow.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--experiment", default="unicom")
    parser.add_argument("--follow", type=int, default=0, metavar="PID", help="go on while this process runs")
    parser.add_argument("--since", type=float, default=0.0, help="with --follow: when that process began, unix seconds")
    parser.add_argument("--poll", type=float, default=3.0, help="seconds between looks at metrics.jsonl")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to keep trying after the run has ended")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # our own line says that MLflow did not answer
    run_dir: Path = options.run_dir.resolve()
    if not run_dir.is_dir():
        parser.error(f"{run_dir} is not a folder")
    follow = Follow(options.follow, options.since) if options.follow else None
    if follow:
        os.nice(10)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking_uri(run_dir, TrackingConfig())
    # A mirror that was just told of the end is still sending: wait for it, then look whether anything is left.
    with _only_one(run_dir, options.patience) as alone:
        if not alone:
            return _EXIT_BUSY
        return mirror(run_dir, uri, options.experiment, follow, options.poll, options.patience)


if __name__ == "__main__":
    sys.exit(main())
