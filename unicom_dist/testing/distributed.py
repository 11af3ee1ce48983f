"""Run a function on several gloo ranks of this machine, with a deadline after which every rank's stack is shown.

Each rank is a fresh process (spawn), so `fn`, its arguments and its result must be picklable; `fn` therefore lives at
module level. A rank that fails ends the others at once. Nothing survives the call: every rank and whatever it started
is killed before it returns.
"""

import faulthandler
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

STACK_SIGNAL = signal.SIGUSR2  # SIGTERM, SIGINT and SIGUSR1 mean "checkpoint and stop" to the trainer


class RankFailure(AssertionError):
    """A rank raised, died or ran out of time; the text holds its traceback or every rank's stack."""


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def rank_environment(rank: int, world_size: int, port: int) -> Iterator[None]:
    """The variables torchrun would set for this rank, for the time of the block."""
    values = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    init_group: bool = True,
) -> list[Any]:
    """`[fn(rank, world_size, *args) for every rank]`, each in its own process of one gloo group.

    `init_group=False` leaves the process group to `fn`; torchrun's variables are set either way.
    RankFailure when a rank raises or dies, or when `timeout_s` seconds pass.
    """
    context = get_context("spawn")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        stacks = [Path(folder) / f"stack-{rank}" for rank in range(world_size)]
        processes: list[BaseProcess] = []
        readers: list[connection.Connection] = []
        try:
            for rank in range(world_size):
                reader, writer = context.Pipe(duplex=False)
                # The variables are set around start() so that they are there before torch is imported.
                with rank_environment(rank, world_size, port):
                    job = (fn, rank, world_size, args, writer, str(stacks[rank]), timeout_s, init_group)
                    process: BaseProcess = context.Process(target=_rank_main, args=job, name=f"rank-{rank}")
                    process.start()
                writer.close()
                processes.append(process)
                readers.append(reader)
            return _collect(processes, readers, stacks, time.monotonic() + timeout_s, timeout_s)
        finally:
            for process in processes:
                _kill_group(process)


def _collect(
    processes: list[BaseProcess],
    readers: list[connection.Connection],
    stacks: list[Path],
    deadline: float,
    timeout_s: float,
) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = {reader: rank for rank, reader in enumerate(readers)}
    while waiting:
        ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailure(_stacks(processes, stacks, sorted(waiting.values()), timeout_s))
        for reader in ready:
            assert isinstance(reader, connection.Connection)
            rank = waiting.pop(reader)
            try:
                good, value = pickle.loads(reader.recv_bytes())  # noqa: S301 - written by our own child
            except EOFError:
                processes[rank].join(5)
                raise RankFailure(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
            if not good:
                raise RankFailure(f"rank {rank} failed:\n{value}")
            results[rank] = value
    for process in processes:
        process.join(max(1.0, deadline - time.monotonic()))
    return [results[rank] for rank in range(len(processes))]


def _stacks(processes: list[BaseProcess], stacks: list[Path], waiting: list[int], timeout_s: float) -> str:
    for process in processes:
        if process.pid is not None and process.is_alive():
            with suppress(ProcessLookupError):
                os.kill(process.pid, STACK_SIGNAL)
    time.sleep(1.0)
    parts = [f"no result from ranks {waiting} within {timeout_s:g} s"]
    for rank, path in enumerate(stacks):
        text = path.read_text() if path.exists() else ""
        parts.append(f"--- rank {rank} ---\n{text or '(no stack: it has ended or had not started)'}")
    return "\n".join(parts)


def _kill_group(process: BaseProcess) -> None:
    """Kill a rank and what it started; the rank leads its own process group."""
    if process.pid is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.is_alive():  # killed before it became the leader of its group
            process.kill()
    process.join(10)


def _rank_main(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple[Any, ...],
    writer: connection.Connection,
    stack_path: str,
    timeout_s: float,
    init_group: bool,
) -> None:
    os.setpgid(0, 0)
    with open(stack_path, "w", encoding="utf-8") as stack_file:
        faulthandler.register(STACK_SIGNAL, file=stack_file, all_threads=True)
        try:
            import torch
            import torch.distributed as dist

            torch.set_num_threads(1)
            if init_group:
                # The test's own deadline comes first: a collective must not end the rank before its stack was taken.
                dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s + 60))
            answer = (True, fn(rank, world_size, *args))
            if init_group and dist.is_initialized():
                dist.destroy_process_group()
            payload = pickle.dumps(answer)
        except BaseException:
            payload = pickle.dumps((False, traceback.format_exc()))
        writer.send_bytes(payload)
        writer.close()
        faulthandler.unregister(STACK_SIGNAL)
