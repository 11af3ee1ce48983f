"""Starting the ranks of this machine and looking after them until they end.

Each rank is `python -m unicom_dist.train.worker`, told what to do on its standard input (which stays open: when it
closes, the launcher is gone and the rank stops). The ranks meet through a file, listen on loopback only and live in
sessions of their own, so that Ctrl-C reaches the launcher alone, which passes it on. A rank that dies takes the others
with it within seconds; what it had to say is read from logs/rank-00000.error.json and raised here.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

from unicom_dist.config.errors import HangError, Preempted, PreflightError, UnicomError, from_record
from unicom_dist.config.schema import Config

STACK_SIGNAL = signal.SIGUSR2  # makes a rank write its stacks to its log, whatever it is stuck in
STACK_S = 1.0  # it has for that
ANSWER_S = 6.0  # from the first rank that found a hang to the end of all that can still say where they are
REMIND_S = 2.0  # between repetitions of a request to stop
GRACE_S = 3.0  # between asking the surviving ranks to end and killing them
# glibc returns every large block to the system at once and faults its pages in again for the next one: on CPUs that is
# more than half of a training step. Keeping them costs memory that the next step needs anyway.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}


def log_path(run_dir: Path, rank: int) -> Path:
    """The log file of a rank."""
    return run_dir / "logs" / f"rank-{rank:05d}.log"


def error_path(run_dir: Path, rank: int) -> Path:
    """Where a rank leaves its error for the launcher."""
    return run_dir / "logs" / f"rank-{rank:05d}.error.json"


def joined() -> bool:
    """Whether torchrun or srun started this process as one of several ranks."""
    return "RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1


def ranks_of(config: Config) -> int:
    """Ranks of a run started now: those that torchrun or srun started, else `parallel.nproc`."""
    given = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") if joined() else None
    return int(given or config.parallel.nproc)


def threads_per_rank(nproc: int, configured: int) -> int:
    """CPU threads of each rank: as configured, else an equal share of the cores this process may use."""
    return configured or max(1, len(os.sched_getaffinity(0)) // nproc)


def launch(runs: Sequence[tuple[Config, list[str]]], run_dir: Path, nproc: int, threads: int) -> None:
    """Have `nproc` workers train the named stages of each of `runs` in order. The error of the first to fail is raised.

    Logs are kept in `run_dir`, that of the run or, of several, their common one.

    Preempted: all ranks wrote a checkpoint after a signal. HangError: a rank was killed.
    """
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    meeting = Path(tempfile.mkdtemp(prefix="unicom-ranks-"))
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        with _forward_signals(ranks) as asked:
            for rank in range(nproc):
                error_path(run_dir, rank).unlink(missing_ok=True)
                ranks.append(_start(rank, nproc, threads, meeting / "rendezvous", log_path(run_dir, rank)))
            items = [{"config": config.model_dump(mode="json"), "stages": names} for config, names in runs]
            text = json.dumps({"folder": str(run_dir), "runs": items}).encode() + b"\n"
            for process in ranks:
                with suppress(BrokenPipeError):  # it has ended already; its status says why
                    _stdin(process).write(text)
                    _stdin(process).flush()
            _watch(ranks, run_dir, asked)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
        shutil.rmtree(meeting, ignore_errors=True)


def _start(rank: int, nproc: int, threads: int, meeting: Path, log: Path) -> subprocess.Popen[bytes]:
    env = KEEP_FREED_MEMORY | dict(
        os.environ,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(nproc),
        LOCAL_WORLD_SIZE=str(nproc),
        OMP_NUM_THREADS=str(threads),
        UNICOM_RENDEZVOUS=str(meeting),
    )
    with log.open("ab") as errors_to:
        return subprocess.Popen(
            [sys.executable, "-m", "unicom_dist.train.worker"],
            env=env,
            stdin=subprocess.PIPE,
            stdout=None if rank == 0 else errors_to,
            stderr=errors_to,
            start_new_session=True,
        )


def _stdin(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdin is not None
    return process.stdin


@contextmanager
def _forward_signals(ranks: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """SIGTERM, SIGUSR1 and Ctrl-C ask the ranks to checkpoint and stop; a second Ctrl-C kills them.

    Yields the signals received so far.
    """
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for process in ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL if asked.count(signal.SIGINT) > 1 else signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(ranks: list[subprocess.Popen[bytes]], run_dir: Path, asked: list[int]) -> None:
    """Until all ranks have ended; raises unless all ended well."""
    remind_s = time.monotonic() + REMIND_S
    while True:
        if asked and time.monotonic() > remind_s:  # a signal is lost on a process that is only just starting
            remind_s = time.monotonic() + REMIND_S
            for process in ranks:
                if process.poll() is None:
                    process.terminate()
        hung = any(_found_hang(error_path(run_dir, rank)) for rank in range(len(ranks)))
        if hung:
            _ask_where(ranks)
        codes = [process.poll() for process in ranks]
        if hung or any(code not in (None, 0, Preempted.exit_code) for code in codes):
            time.sleep(0.2)  # the others often fail in consequence: look once more before naming the cause
            codes = [process.poll() for process in ranks]
            if HangError.exit_code in codes and not hung:
                _ask_for_stacks(ranks, STACK_S)
                codes = [process.poll() for process in ranks]
            _end(ranks)
            if asked and all(
                code in (None, 0, Preempted.exit_code, -signal.SIGTERM, -signal.SIGKILL) for code in codes
            ):
                raise Preempted(
                    "stopped on request",
                    "the ranks had not begun a step, or Ctrl-C was pressed again: nothing new was written",
                    "run the same command again: it continues from the last checkpoint",
                )
            raise _cause(codes, run_dir)
        if all(code is not None for code in codes):
            break
        time.sleep(0.05)
    if Preempted.exit_code in codes:
        raise _cause(codes, run_dir)


def _found_hang(error: Path) -> bool:
    """Whether a rank's watchdog left this: the rank is still there, and with it the connections of the others."""
    try:
        record = json.loads(error.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or not yet whole
        return False
    return _by_watchdog(record)


def _by_watchdog(record: dict[str, Any]) -> bool:
    return record["type"] == HangError.__name__ and not record["unexpected"]


def _ask_where(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Have all ranks say where they are and end.

    The line reaches their watchdogs. A rank that holds Python's lock has none that could answer: the signal gets its
    stacks.
    """
    for process in ranks:
        if process.poll() is None:
            with suppress(BrokenPipeError):
                _stdin(process).write(b"a rank hangs\n")
                _stdin(process).flush()
    _ask_for_stacks(ranks, ANSWER_S)


def _ask_for_stacks(ranks: list[subprocess.Popen[bytes]], wait_s: float) -> None:
    """Have the ranks that are still there write their stacks; one that was stopped is woken up for it."""
    for process in ranks:
        if process.poll() is None:
            process.send_signal(STACK_SIGNAL)
            process.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + wait_s
    while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in ranks:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def _cause(codes: list[int | None], run_dir: Path) -> UnicomError:
    """The error to show: a rank ended by a signal first, then the earliest error that says what is wrong."""
    for rank, code in enumerate(codes):
        if code is not None and code < 0:
            name = signal.Signals(-code).name if -code in signal.Signals.__members__.values() else str(-code)
            out_of_memory = " (often: the machine was out of memory)" if -code == signal.SIGKILL else ""
            return HangError(
                f"rank {rank} was ended by {name}{out_of_memory}; the other ranks were stopped",
                f"its log is {log_path(run_dir, rank)}",
                "run the same command again: it continues from the last checkpoint",
                "docs/training.md",
            )
    records = []
    for rank, code in enumerate(codes):
        if code not in (None, 0):
            with suppress(OSError, ValueError):
                record = json.loads(error_path(run_dir, rank).read_text(encoding="utf-8"))
                records.append((record["unexpected"], record["time"], record))  # often another's end is the cause
    if records:
        record = min(records, key=lambda item: item[:2])[2]
        if _by_watchdog(record):  # where each of them was
            record["why"] = "; ".join(other["why"] for _, _, other in records if _by_watchdog(other))
        return from_record(record)
    rank = next(rank for rank, code in enumerate(codes) if code not in (None, 0))
    return PreflightError(
        f"rank {rank} ended with exit code {codes[rank]} and left no word",
        f"it could not start, or the disk of {run_dir} is full; its log is {log_path(run_dir, rank)}",
        "unicom doctor",
    )
