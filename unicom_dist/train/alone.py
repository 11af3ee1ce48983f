"""What rank 0 does alone while the other ranks wait, however long it takes.

A rank that waits in a collective is ended by its timeout. So the ranks agree on a name for the work, and from then on
rank 0 leaves signs of life under it in run_dir/logs/alone.json, and at last how the work ended; the others look there.
"""

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unicom_dist.config.errors import HangError, UnicomError, from_record
from unicom_dist.config.storage import storage_error

if TYPE_CHECKING:
    from unicom_dist.parallel.mesh import Mesh

log = logging.getLogger(__name__)

BEAT_S = 1.0  # between signs of life, and the longest between looks for them
FIRST_LOOK_S = 0.01
DOCS = "docs/training.md#ranks"


def alone(mesh: "Mesh", run_dir: Path, what: str, work: Callable[[], object], silence_s: float) -> None:
    """Have rank 0 do `work`; every rank returns when it is done. `what`: what rank 0 is then doing, for messages.

    An error of `work` is raised on every rank, as the same class. HangError on the other ranks when nothing is seen of
    rank 0 for `silence_s`: it died, or they do not share `run_dir`. OSError on rank 0 when it cannot tell them of its
    end. Collective over the world, but for an instant only.
    """
    if mesh.world == 1:
        work()
        return
    attempt, path = str(mesh.broadcast_object(uuid.uuid4().hex)), run_dir / "logs" / "alone.json"
    if mesh.rank:
        _wait(path, attempt, what, silence_s)
        return
    try:
        with _signs_of_life(path, attempt):
            work()
    except BaseException as error:
        known = error if isinstance(error, UnicomError) else storage_error(error)
        known = known or UnicomError(repr(error), "see the output of rank 0")
        with suppress(OSError):
            _write(path, attempt, error=known.record())
        raise
    _write(path, attempt, done=True)


@contextmanager
def _signs_of_life(path: Path, attempt: str) -> Iterator[None]:
    over = threading.Event()

    def beat() -> None:
        number = 0
        while True:
            try:
                _write(path, attempt, beat=number)
            except OSError as error:
                log.warning("the other ranks cannot be told how rank 0 gets on: %s", error)
            if over.wait(BEAT_S):
                return
            number += 1

    thread = threading.Thread(target=beat, name="signs-of-life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _write(path: Path, attempt: str, **content: Any) -> None:
    temporary = path.with_suffix(".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps({"attempt": attempt, **content}), encoding="utf-8")
    os.replace(temporary, path)


def _wait(path: Path, attempt: str, what: str, silence_s: float) -> None:
    last: dict[str, Any] = {}
    since, pause = time.monotonic(), FIRST_LOOK_S
    while True:
        now = _read(path)
        if now.get("attempt") == attempt:
            if "done" in now:
                return
            if "error" in now:
                error = from_record(now["error"])
                error.why = f"{error.why} (rank 0 was {what}, the others waited)".strip()
                raise error
            if now != last:
                last, since = now, time.monotonic()
        if time.monotonic() - since > silence_s:
            raise HangError(
                f"nothing was seen of rank 0 for {silence_s:g} s while it was {what}",
                f"it died or was stopped, or this rank does not see its {path}",
                "see the output of rank 0, put run_dir on a file system that all machines share, and run the same"
                " command again to continue",
                DOCS,
            )
        time.sleep(pause)
        pause = min(2 * pause, BEAT_S)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
