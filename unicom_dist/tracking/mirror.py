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

from unicom_dist.config.schema import TrackingConfig
from unicom_dist.tracking.rundir import read_config
from unicom_dist.tracking.status import read_status

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
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)} --host 127.0.0.1"


def read_tracking(run_dir: str | Path) -> TrackingConfig:
    """The `tracking` section of the run's config.yaml; the defaults where it has none."""
    section = read_config(run_dir).values.get("tracking", {})
    known = {key: value for key, value in section.items() if key in TrackingConfig.model_fields}
    return TrackingConfig(**known)


def start_mirror(run_dir: str | Path, tracking: TrackingConfig) -> subprocess.Popen[bytes] | None:
    """Start the mirror of a run; None when `tracking.mlflow` is off. Its log is logs/mlflow.log.

    Call it once, on one process per run. It ends by itself after the run's status is final; do not wait for it.
    """
    if not tracking.mlflow:
        return None
    folder = Path(run_dir)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    with (folder / "logs" / "mlflow.log").open("ab") as output:
        # A session of its own: Ctrl-C ends the training, and then the mirror has still something to send.
        return subprocess.Popen(
            _command(folder, tracking),
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
    shown = _without_credentials(uri)
    if not settings.mlflow:
        return SyncResult(False, "MLflow is switched off (tracking.mlflow = false)", "")
    command = [*_command(folder, settings), "--once", "--patience", str(timeout_s / 2)]
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
    reason = lines[-1] if lines else "no answer"
    return SyncResult(False, f"MLflow at {shown} is not up to date, run this again later: {reason}", ui_command(uri))


def mirror(run_dir: Path, uri: str, experiment: str, *, once: bool, poll_s: float, patience_s: float) -> int:
    """Send until the run has ended (`once`: until everything of now is sent); the exit status of the process.

    After the end of the run, or with `once`, it gives up when MLflow has not answered for `patience_s` seconds.
    """
    from unicom_dist.tracking.mlflow_runs import MlflowRuns

    runs: MlflowRuns | None = None
    wait_s, since_s = poll_s, time.monotonic()
    while True:
        status = read_status(run_dir)  # before reading metrics: what was written before the end is then sent
        ending = once or (status is not None and status.final)
        try:
            runs = runs or MlflowRuns(run_dir, uri, experiment)
            while not runs.send():
                pass
            if status is not None and status.final:
                runs.finish(status)
            if ending:
                return _EXIT_SENT
            if status is None and time.monotonic() - since_s > patience_s:
                return _EXIT_SENT  # nobody runs here
            wait_s = poll_s
            if status is not None:
                since_s = time.monotonic()
        except Exception as error:
            text = " ".join(str(error).split())
            log.warning("MLflow at %s: %s: %.300s", _without_credentials(uri), type(error).__name__, text)
            if ending and time.monotonic() - since_s > patience_s:
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


def _without_credentials(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def main(arguments: list[str] | None = None) -> int:
    """Entry of the mirror process; the address of MLflow is in MLFLOW_TRACKING_URI."""
    parser = argparse.ArgumentParser(description="Carry a run's metrics and pictures to MLflow.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--experiment", default="unicom")
    parser.add_argument("--once", action="store_true", help="send what there is now, then end")
    parser.add_argument("--poll", type=float, default=3.0, help="seconds between looks at metrics.jsonl")
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to keep trying after the run has ended")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    run_dir: Path = options.run_dir.resolve()
    if not run_dir.is_dir():
        parser.error(f"{run_dir} is not a folder")
    if not options.once:
        os.nice(10)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking_uri(run_dir, TrackingConfig())
    with _only_one(run_dir, options.patience if options.once else 0.0) as alone:
        if not alone:
            return _EXIT_BUSY
        return mirror(
            run_dir, uri, options.experiment, once=options.once, poll_s=options.poll, patience_s=options.patience
        )


if __name__ == "__main__":
    sys.exit(main())
