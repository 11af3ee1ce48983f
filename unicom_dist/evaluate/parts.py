"""A measurement in parts: each a batch of pictures, measured by some process and kept in a file of its own.

What a part holds depends on its number alone, and parts are put together in their order, so that the result is the same
for any number of processes. Parts that are there are not measured again, unless something they depend on has changed.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from unicom_dist.config.errors import PreflightError
from unicom_dist.config.storage import reason
from unicom_dist.evaluate.picture_pairs import PictureSource
from unicom_dist.evaluate.ruler import Ruler

PART = 32  # pictures


@dataclass(frozen=True)
class PartTask:
    """Pictures first .. last - 1, measured into the file `target`."""

    name: str
    first: int
    last: int
    target: str


class Worker:
    """Measures parts; one lives in each process."""

    def __init__(self, source: PictureSource, ruler: Ruler) -> None:
        self._source, self._ruler = source, ruler

    def process(self, task: PartTask, count: Callable[[int], None]) -> None:
        """Write the part's file. PreflightError if it cannot be written."""
        numbers = range(task.first, task.last)
        pairs, left_out = self._source.pairs(numbers)
        arrays: dict[str, NDArray[Any]] = {}
        if pairs:
            measured = self._ruler.measure(pairs)
            arrays = dict(measured.scores)
            if measured.originals is not None and measured.rebuilt is not None:
                arrays |= {"originals": measured.originals, "rebuilt": measured.rebuilt}
        arrays["sizes"] = np.array([pair.original.size for pair in pairs], np.int64).reshape(-1, 2)
        facts = {"keys": json.dumps([pair.key for pair in pairs]), "left_out": json.dumps(left_out)}
        temporary = f"{task.target}.{os.getpid()}.tmp"
        try:
            save_file(arrays, temporary, facts)
            os.replace(temporary, task.target)
        except (OSError, SafetensorError) as error:
            raise PreflightError(f"{task.target} cannot be written", reason(error), "free some space") from None
        count(len(numbers))


class Build:
    """Makes a worker: in this process from the source and the networks that are loaded in it, in another one anew."""

    def __init__(self, make_source: Callable[[], PictureSource], make_ruler: Callable[[], Ruler]) -> None:
        self._make_source, self._make_ruler = make_source, make_ruler

    @cached_property
    def source(self) -> PictureSource:
        """Made when first asked for."""
        return self._make_source()

    @cached_property
    def ruler(self) -> Ruler:
        """Loaded when first asked for."""
        return self._make_ruler()

    def __call__(self) -> Worker:
        return Worker(self.source, self.ruler)

    def __reduce__(self) -> tuple[type["Build"], tuple[Callable[[], PictureSource], Callable[[], Ruler]]]:
        return type(self), (self._make_source, self._make_ruler)


Execute = Callable[[Build, Sequence[PartTask]], Iterable[tuple[PartTask, Any]]]


def in_this_process(build: Build, tasks: Sequence[PartTask]) -> Iterator[tuple[PartTask, Any]]:
    """The tasks one after the other."""
    worker = build()
    for task in tasks:
        worker.process(task, lambda _: None)
        yield task, None


class Part(NamedTuple):
    """What a file holds; see `Measured`. `sizes` [n, 2]: width, height."""

    keys: list[str]
    left_out: list[str]
    sizes: NDArray[np.int64]
    arrays: dict[str, NDArray[Any]]


def measure_parts(
    folder: Path, pictures: int, identity: dict[str, Any], build: Build, execute: Execute
) -> Iterator[Part]:
    """Measure what is missing in `folder` and give all parts in order. Errors of the workers pass through.

    identity: what the parts depend on, as JSON values; `folder` is emptied when it is another than before.
    """
    _prepare(folder, json.dumps({"part": PART, **identity}, sort_keys=True))
    starts = range(0, pictures, PART)
    tasks = [
        PartTask(f"part {number}", first, min(first + PART, pictures), str(folder / f"{number:06d}.safetensors"))
        for number, first in enumerate(starts)
    ]
    todo = [task for task in tasks if not Path(task.target).is_file()]
    if todo:
        for _ in execute(build, todo):
            pass
    for task in tasks:
        with safe_open(task.target, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            facts = file.metadata()
        yield Part(json.loads(facts["keys"]), json.loads(facts["left_out"]), arrays.pop("sizes"), arrays)


def _prepare(folder: Path, identity: str) -> None:
    note = folder / "identity.json"
    try:
        if not note.is_file() or note.read_text(encoding="utf-8") != identity:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            note.write_text(identity, encoding="utf-8")
    except OSError as error:
        raise PreflightError(
            f"{folder} cannot be written", reason(error), "make it writable, or name another with --out"
        ) from None
