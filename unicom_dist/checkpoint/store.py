"""Checkpoints of a stage: written behind the training step, whole or not there, readable under another dp size.

checkpoints/<stage>/step-000200/ holds rank-00000-of-00002.safetensors (that rank's fragments as one-dimensional tensors
"weight/<parameter>", "exp_avg/…", "exp_avg_sq/…", "ema/…", and its random state), state.json (step, data position,
parameter shapes) and COMPLETE. A save copies the flat buffers to a staging area (the only stall), a thread writes them
into a hidden folder, and rank 0 renames it when every rank has finished. A folder without COMPLETE is not a checkpoint.
"""

import json
import logging
import os
import shutil
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from unicom_dist.checkpoint.tensorfile import TensorFile, write_tensors
from unicom_dist.config.errors import CheckpointError
from unicom_dist.parallel.engine import Buffers, Fragment
from unicom_dist.parallel.mesh import Mesh

log = logging.getLogger(__name__)

COMPLETE = "COMPLETE"
FORMAT = 1
SETTLE_S = 10.0
_DOCS = "docs/checkpoints.md"
State = dict[str, Buffers]


def rank_file(rank: int, world: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a stage, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / COMPLETE).is_file())


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a stage, or None."""
    found = checkpoints(folder)
    return found[-1] if found else None


class CheckpointStore:
    """Saves one stage's checkpoints. Constructing it is collective over the world.

    `save` returns as soon as the state is copied; a failure of the writer raises at the next `save` or `wait`.
    """

    def __init__(self, folder: Path, mesh: Mesh, keep: int = 2, timeout_s: float = 600.0) -> None:
        self.folder, self.mesh, self.keep, self.timeout_s = folder, mesh, keep, timeout_s
        self._attempt = mesh.broadcast_object(uuid.uuid4().hex[:8])
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._staging: dict[str, Buffers] = {}
        if mesh.rank == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _write_error(folder, error) from None
            for stale in folder.glob(".step-*"):
                shutil.rmtree(stale, ignore_errors=True)

    def save(self, step: int, state: State, fragments: list[Fragment], extra: dict[str, Any], replicated: bool) -> None:
        """Stage the state and start writing. Every rank calls it at the same step; waits for the write before it.

        `replicated`: all ranks hold the same state, rank 0 writes it. `extra` (JSON) is rank 0's, for `read_extra`.
        CheckpointError when the last write failed or this one cannot fit on the disk.
        """
        self.wait()
        mine = state if not replicated or self.mesh.zero.rank == 0 else {}
        need = sum(buffer.numel() * buffer.element_size() for buffers in mine.values() for buffer in buffers)
        self._check_space(need)
        self._stage(mine)
        tensors = self._named(fragments if mine else [])
        tensors["rng/torch"] = torch.get_rng_state()
        where = {f.name: [f.offset, f.numel] for f in fragments} if mine else {}
        shapes = {f.name: list(f.piece.shape) for f in fragments}
        text = json.dumps({"format": FORMAT, "step": step, "dp": self.mesh.dp.size, "shapes": shapes, **extra})
        self._thread = threading.Thread(
            target=self._write,
            args=(step, tensors, {"fragments": json.dumps(where)}, text),
            name="checkpoint",
            daemon=True,
        )
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the write under way come to its end also when an error ends the run; not for long: a rank may be dead."""
        if self._thread is not None:
            self._thread.join(SETTLE_S)

    def wait(self) -> None:
        """Until the checkpoint under way is on disk (rank 0: under its final name). CheckpointError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error if isinstance(error, CheckpointError) else _write_error(self.folder, error)

    def _stage(self, state: State) -> None:
        """Copy into buffers kept from one save to the next: allocating them anew costs more than the copy."""
        if {k: [b.numel() for b in v] for k, v in state.items()} != {
            k: [b.numel() for b in v] for k, v in self._staging.items()
        }:
            self._staging = {k: [torch.empty(b.shape, dtype=b.dtype) for b in v] for k, v in state.items()}
        for kind, buffers in state.items():
            for target, buffer in zip(self._staging[kind], buffers, strict=True):
                target.copy_(buffer)

    def _named(self, fragments: list[Fragment]) -> dict[str, Tensor]:
        named = {}
        for kind, buffers in self._staging.items():
            for f in fragments:
                if buffers[f.group].numel():
                    named[f"{kind}/{f.name}"] = buffers[f.group][f.start : f.start + f.numel]
        return named

    def _check_space(self, need: int) -> None:
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise _write_error(self.folder, error) from None
        if free < need * 1.05 + (1 << 20):
            raise CheckpointError(
                f"a checkpoint of {need / 2**20:.0f} MiB does not fit: {free / 2**20:.0f} MiB free at {self.folder}",
                "the disk is nearly full; the checkpoints written before are kept",
                "free space, or set keep_checkpoints lower; running the same command again continues",
                _DOCS,
            )

    def _write(self, step: int, tensors: dict[str, Tensor], metadata: dict[str, str], state: str) -> None:
        final = self.folder / f"step-{step:06d}"
        partial = self.folder / f".step-{step:06d}.{self._attempt}"
        try:
            partial.mkdir(parents=True, exist_ok=True)
            name = rank_file(self.mesh.rank, self.mesh.world)
            write_tensors(partial / name, tensors, metadata)
            (partial / f"{name}.done").touch()
            if self.mesh.rank == 0:
                self._commit(partial, final, state)
        except BaseException as error:
            self._error = error
            if self.mesh.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)

    def _commit(self, partial: Path, final: Path, state: str) -> None:
        """Wait for every rank's file, then give the folder its name."""
        done = [partial / f"{rank_file(rank, self.mesh.world)}.done" for rank in range(self.mesh.world)]
        deadline = time.monotonic() + self.timeout_s
        while missing := [path for path in done if not path.exists()]:
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{final.name}: no {missing[0].name.removesuffix('.done')} after {self.timeout_s:.0f} s",
                    "that rank did not finish its part, or does not see this folder",
                    "put run_dir on a file system that all machines share",
                    _DOCS,
                )
            time.sleep(0.005)
        for path in done:
            path.unlink()
        _write_synced(partial / "state.json", state)
        _write_synced(partial / COMPLETE, "")
        if final.exists():  # the same step again, after a resume from an older checkpoint
            shutil.rmtree(final)
        os.replace(partial, final)
        for old in checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)


def read_extra(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint. CheckpointError when it is incomplete or foreign."""
    if not (checkpoint / COMPLETE).is_file():
        raise CheckpointError(
            f"{checkpoint} is not a checkpoint", "it has no COMPLETE file", "name a folder step-… that has one", _DOCS
        )
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']}, this version reads {FORMAT}")
        int(state["dp"]), int(state["step"]), dict(state["shapes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint}/state.json cannot be used", str(error), "remove the folder to use the one before it", _DOCS
        ) from None
    return state  # type: ignore[no-any-return]


def read_state(checkpoint: Path, fragments: list[Fragment], like: State, kinds: tuple[str, ...]) -> State:
    """Buffers shaped as `like`, filled with this rank's fragments, whatever dp size wrote the checkpoint.

    A kind in `kinds` that a parameter lacks (frozen when it was written) stays zero.
    CheckpointError when names or shapes are not the model's, or a file is damaged.
    """
    extra = read_extra(checkpoint)
    _check_model(checkpoint, extra["shapes"], fragments)
    files = [TensorFile(path) for path in sorted(checkpoint.glob("rank-*.safetensors"))]
    pieces: dict[str, list[tuple[int, int, TensorFile]]] = {}
    for file in files:
        for name, (offset, numel) in json.loads(file.metadata.get("fragments", "{}")).items():
            pieces.setdefault(name, []).append((offset, numel, file))
    result: State = {kind: [torch.zeros(b.shape, dtype=b.dtype) for b in like[kind]] for kind in kinds}
    for f in fragments:
        for offset, numel, file in pieces.get(f.name, []):
            start, stop = max(offset, f.offset), min(offset + numel, f.offset + f.numel)
            if start >= stop:
                continue
            target = slice(f.start + start - f.offset, f.start + stop - f.offset)
            for kind, buffers in result.items():
                if buffers[f.group].numel() and f"{kind}/{f.name}" in file:
                    buffers[f.group][target] = file.read(f"{kind}/{f.name}", start - offset, stop - offset)
    return result


def read_rng(checkpoint: Path, mesh: Mesh) -> Tensor | None:
    """This rank's random state, when the checkpoint was written by as many ranks; else None."""
    path = checkpoint / rank_file(mesh.rank, mesh.world)
    return TensorFile(path).read("rng/torch") if path.is_file() else None


def _check_model(checkpoint: Path, saved: dict[str, list[int]], fragments: list[Fragment]) -> None:
    wanted = {f.name: list(f.piece.shape) for f in fragments}
    if saved == wanted:
        return
    differing = sorted(
        f"{name}: {saved.get(name, 'absent')} saved, {wanted.get(name, 'absent')} configured"
        for name in saved.keys() | wanted.keys()
        if saved.get(name) != wanted.get(name)
    )
    raise CheckpointError(
        f"{checkpoint} holds another model: {differing[0]}",
        f"{len(differing)} of {len(wanted)} parameters differ in name or shape",
        "undo the change of the model's configuration, or choose another run_dir",
        _DOCS,
    )


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _write_error(folder: Path, error: BaseException) -> CheckpointError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
    return CheckpointError(
        f"a checkpoint could not be written to {folder}: {reason}",
        "the checkpoints written before are kept",
        "free space or make the folder writable; running the same command again continues",
        _DOCS,
    )
