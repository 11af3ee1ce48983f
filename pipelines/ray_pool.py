"""Ray as this project uses it: actors that each turn one shard into another, and a driver that watches them.

A task is any picklable value; a worker is an object with `process(task, count)`, built inside its actor. A killed actor
is replaced and its shard done again, up to ATTEMPTS times. Errors meant for the user pass through unchanged.
Ray serves on the loopback address only, without dashboard and without usage statistics; RAY_ADDRESS joins a cluster.
"""

import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from unicom_dist.config.errors import DataError, Preempted, PreflightError, UnicomError

log = logging.getLogger(__name__)
ATTEMPTS = 3
OBJECT_STORE_BYTES = 128 << 20  # only task descriptions and results pass through it; data goes from file to file
POLL_S = 0.5
NODE_CHECK_S = 5.0
# glibc gives freed tensors back to the system at once, and asking for them again costs more than the encoder's work.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


class Task(Protocol):
    """A shard to make."""

    @property
    def name(self) -> str:
        """What errors and the ledger call it."""


class Worker(Protocol):
    """Turns one shard into another. Lives in one actor."""

    def process(self, task: Any, count: Callable[[int], None]) -> Any:
        """Make the shard; `count(n)` tells that n more samples are done."""


@dataclass(frozen=True)
class Resources:
    """What each actor gets."""

    workers: int
    threads: int
    gpus: int = 0


def resources(workers: int, tasks: int, use_gpus: bool = True) -> Resources:
    """`workers` actors (0 = one per GPU, or one per core without GPUs), never more than tasks; cores shared evenly."""
    cores = len(os.sched_getaffinity(0))
    gpus = 0
    if use_gpus:
        import torch

        gpus = torch.cuda.device_count()
    count = max(min(workers or gpus or cores, tasks), 1)
    return Resources(count, max(cores // count, 1), 1 if gpus >= count else 0)


@contextmanager
def ray_session(resources: Resources) -> Iterator[None]:
    """A Ray of this process for the time of the block; one that runs already is used and left running.

    PreflightError: Ray does not start.
    """
    address = os.environ.get("RAY_ADDRESS", "local")
    # Ray would run its workers at niceness 15, behind everything else on the machine.
    with _environment(MALLOC | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}):
        import ray
        from ray._private import ray_constants

        if ray.is_initialized():
            yield
            return
        if address == "local":
            # Ray's own switch for machines that are no cluster: its servers listen on 127.0.0.1 instead of everywhere.
            # Its environment variable works only before the first import of ray, which other packages may have done.
            ray_constants.ENABLE_RAY_CLUSTER = False
        logging.getLogger("ray").setLevel(logging.ERROR)
        local: dict[str, Any] = {
            "num_cpus": resources.workers * resources.threads,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
        remote = {"runtime_env": {"env_vars": MALLOC}}
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **(local if address == "local" else remote),
            )
        except Exception as error:  # Ray raises what its processes happen to print
            raise PreflightError(
                "Ray does not start",
                (str(error).splitlines() or [type(error).__name__])[0][:300],
                "`unicom doctor` shows what the machine has; RAY_ADDRESS names a cluster that runs already",
                "docs/data.md",
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables that are set for the block unless they are set already; what the block starts inherits them."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


class _Actor:
    """Runs in a Ray process. The worker is built on first use, so that its errors reach the driver as they are."""

    def __init__(self, build: Callable[[], Worker]) -> None:
        self._build = build
        self._worker: Worker | None = None
        self._counted = 0

    def process(self, task: Any) -> Any:
        if self._worker is None:
            self._worker = self._build()
        try:
            return self._worker.process(task, self._count)
        finally:
            self._counted = 0

    def _count(self, samples: int) -> None:
        self._counted += samples

    def counted(self) -> int:
        """Samples of the current task; answered beside `process`."""
        return self._counted


class ActorPool:
    """Runs tasks on actors. Use inside `ray_session`, as a context manager: leaving the block ends the actors.

    SIGTERM ends `run` with `Preempted`. It is noted and answered between two looks at the actors, because an exception
    inside Ray's own code comes out as another one.
    """

    def __init__(self, build: Callable[[], Worker], resources: Resources) -> None:
        import ray

        self._ray = ray
        self._build = build
        self._resources = resources
        # Ray sets OMP_NUM_THREADS to num_cpus.
        options = {"num_cpus": resources.threads, "num_gpus": resources.gpus, "max_concurrency": 2, "max_restarts": 0}
        self._class = ray.remote(_Actor).options(**options)
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[Any, Any]] = {}
        self._asked: dict[Any, Any] = {}
        self._counts: dict[Any, int] = {}
        self._next_check = 0.0
        self._terminated = False
        self._previous: Any = None

    def run(self, tasks: Sequence[Any], on_count: Callable[[int], None]) -> Iterator[tuple[Any, Any]]:
        """(task, result) as they finish. `on_count`: samples done in unfinished tasks, a few times per second.

        The error of a worker, if it is a UnicomError; DataError for any other; PreflightError when a task's actor was
        killed ATTEMPTS times, or Ray's own processes here were.
        """
        waiting = deque(tasks)
        attempts: dict[str, int] = {}
        while waiting or self._running:
            if self._terminated:
                remedy = "run the command again; finished shards are kept"
                raise Preempted("stopped by SIGTERM", "", remedy, "docs/data.md")
            while waiting and len(self._running) < self._resources.workers:
                actor = self._idle.pop() if self._idle else self._class.remote(self._build)
                task = waiting.popleft()
                self._running[actor.process.remote(task)] = (actor, task)
            ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=POLL_S)
            for ref in ready:
                actor, task = self._running.pop(ref)
                self._counts.pop(actor, None)
                self._asked.pop(actor, None)
                try:
                    result = self._ray.get(ref)
                except self._ray.exceptions.RayTaskError as error:
                    raise _translated(error, task) from error
                except self._ray.exceptions.RayError as error:
                    attempts[task.name] = attempts.get(task.name, 0) + 1
                    if attempts[task.name] >= ATTEMPTS:
                        raise PreflightError(
                            f"{task.name}: its worker was killed {ATTEMPTS} times",
                            f"{type(error).__name__}; often the machine ran out of memory",
                            "fewer features.workers, a smaller encoder.batch, or more memory; "
                            "the next run continues after the finished shards",
                            "docs/data.md",
                        ) from error
                    log.warning("%s: the worker was killed (%s); once more", task.name, type(error).__name__)
                    waiting.appendleft(task)
                else:
                    self._idle.append(actor)
                    yield task, result
            on_count(self._poll())
            self._check_node()

    def _poll(self) -> int:
        """Samples done in the running tasks, as far as their actors have answered."""
        for actor, _ in self._running.values():
            ref = self._asked.get(actor)
            if ref is None:
                self._asked[actor] = actor.counted.remote()
            elif self._ray.wait([ref], timeout=0)[0]:
                with suppress(self._ray.exceptions.RayError):
                    self._counts[actor] = self._ray.get(ref)
                self._asked[actor] = None
        return sum(self._counts.values())

    def _check_node(self) -> None:
        """PreflightError once this machine's Ray is gone: whoever waits for it would wait for ever, without error."""
        if time.monotonic() < self._next_check:
            return
        self._next_check = time.monotonic() + NODE_CHECK_S
        here = self._ray.get_runtime_context().get_node_id()
        if not any(node["NodeID"] == here and node["Alive"] for node in self._ray.nodes()):
            raise PreflightError(
                "Ray on this machine has ended",
                "one of its own processes (raylet, gcs_server or an agent) was killed; often the memory ran out",
                "run the command again; finished shards are kept",
                "docs/data.md",
            )

    def _note_termination(self, *_: object) -> None:
        self._terminated = True

    def __enter__(self) -> "ActorPool":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._note_termination)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
        for actor in [*self._idle, *(actor for actor, _ in self._running.values())]:
            with suppress(Exception):
                self._ray.kill(actor)


def _translated(error: Any, task: Any) -> UnicomError:
    cause = error.cause if isinstance(getattr(error, "cause", None), BaseException) else error
    if isinstance(cause, UnicomError):
        return cause
    log.debug("%s", error)
    return DataError(
        f"{task.name} could not be made",
        f"{type(cause).__name__}: {str(cause).splitlines()[0][:200] if str(cause) else ''}",
        "check the shard with `unicom data check`",
        "docs/data.md",
    )
