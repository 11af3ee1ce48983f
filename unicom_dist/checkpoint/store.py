"""Writing a stage's checkpoints behind the training step: whole or not there, readable under any other layout.

checkpoints/<stage>/step-000200/ holds rank-00000-of-00002.safetensors (the fragments that rank owns as one-dimensional
tensors "weight/<tensor>", "exp_avg/…", "exp_avg_sq/…", "ema/…", and its random state), state.json (step, layout, data
position, and where the fragments of every tensor lie) and COMPLETE (the digest of state.json). A save copies the flat
buffers to a staging area (the only stall), a thread writes them into a hidden folder, and rank 0 completes and renames
it when every rank has finished. A folder without COMPLETE is not a checkpoint.
"""

import json
import math
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
from xxhash import xxh3_64_hexdigest

from unicom_dist.checkpoint.saved import COMPLETE, DOCS, FORMAT, State, checkpoints, layout_of, rank_file
from unicom_dist.checkpoint.tensorfile import TensorFile, sync_folder, write_synced, write_tensors
from unicom_dist.config.errors import CheckpointError
from unicom_dist.parallel.engine import Buffers, Fragment
from unicom_dist.parallel.mesh import Mesh

SETTLE_S = 10.0


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
        writes = not replicated or self.mesh.zero.rank == 0
        mine = state if writes else {}
        self._check_space(sum(buffer.nbytes for buffers in mine.values() for buffer in buffers))
        self._stage(mine)
        # What `extra` refers to goes on changing, so it becomes text now.
        text = json.dumps({"format": FORMAT, "step": step, "layout": layout_of(self.mesh.layout), **extra})
        self._thread = threading.Thread(
            target=self._write,
            args=(step, owned(fragments) if writes else [], torch.get_rng_state(), text),
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
        """Copy into buffers kept from one save to the next: allocating them anew costs more than the copy.

        What is on a GPU is copied into page-locked memory, all of it at once. Not measured yet.
        """
        if {k: [b.numel() for b in v] for k, v in state.items()} != {
            k: [b.numel() for b in v] for k, v in self._staging.items()
        }:
            self._staging = {k: [_room_for(b) for b in v] for k, v in state.items()}
        for kind, buffers in state.items():
            for target, buffer in zip(self._staging[kind], buffers, strict=True):
                target.copy_(buffer, non_blocking=True)
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)

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
                DOCS,
            )

    def _write(self, step: int, mine: list[Fragment], rng: Tensor, state: str) -> None:
        final = self.folder / f"step-{step:06d}"
        partial = self.folder / f".step-{step:06d}.{self._attempt}"
        tensors = {
            f"{kind}/{f.name}": buffers[f.group][f.start : f.start + f.numel]
            for kind, buffers in self._staging.items()
            for f in mine
            if buffers[f.group].numel()
        }
        try:
            partial.mkdir(parents=True, exist_ok=True)
            name = rank_file(self.mesh.rank, self.mesh.world)
            metadata = describe(mine, f"{step} {self._attempt}")
            write_tensors(partial / name, {**tensors, "rng/torch": rng}, metadata)
            (partial / f"{name}.done").touch()
            if self.mesh.rank == 0:
                self._await_others(partial, final.name)
                complete(partial, final, self.mesh.world, json.loads(state))
                for old in checkpoints(self.folder)[: -self.keep]:
                    shutil.rmtree(old, ignore_errors=True)
        except BaseException as error:
            self._error = error
            if self.mesh.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)

    def _await_others(self, partial: Path, name: str) -> None:
        done = [partial / f"{rank_file(rank, self.mesh.world)}.done" for rank in range(self.mesh.world)]
        deadline = time.monotonic() + self.timeout_s
        while missing := [path for path in done if not path.exists()]:
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{name}: no {missing[0].name.removesuffix('.done')} after {self.timeout_s:.0f} s",
                    "that rank did not finish its part, or does not see this folder",
                    "put run_dir on a file system that all machines share",
                    DOCS,
                )
            time.sleep(0.005)
        for path in done:
            path.unlink()


def _room_for(buffer: Tensor) -> Tensor:
    """Memory of the host that a copy of `buffer` fits in; page-locked for one on a GPU, to which it is then quicker."""
    return torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=buffer.device.type == "cuda")


def owned(fragments: list[Fragment]) -> list[Fragment]:
    """Those that belong into this rank's file; empty tensors too, because they are part of the model."""
    return [f for f in fragments if f.piece.owner and (f.numel or not f.piece.numel)]


def describe(mine: list[Fragment], save: str) -> dict[str, str]:
    """Metadata of a rank's file: what its tensors are cuts of. `save` tells the files of one save from another's."""
    fragments = {}
    for f in mine:
        p = f.piece
        fragments[f.name] = [p.shape, p.dim, p.begin, p.cut[p.dim] if p.shape else -1, f.offset, f.numel]
    if len(fragments) < len(mine):
        raise ValueError("a rank's file has room for one fragment of a tensor")
    return {"save": save, "fragments": json.dumps(fragments, separators=(",", ":"))}


def complete(partial: Path, final: Path, world: int, state: dict[str, Any]) -> None:
    """Make a checkpoint of a folder with every rank's file: write what is where, then give it its name.

    CheckpointError, and no checkpoint, when the files do not hold every value of every tensor exactly once.
    """
    files, tensors = [], dict[str, dict[str, Any]]()
    for number in range(world):
        file = TensorFile(partial / rank_file(number, world))
        files.append([file.path.name, file.size, file.digest])
        kinds = dict[str, list[str]]()
        for name in file.names():
            kind, _, tensor = name.partition("/")
            kinds.setdefault(tensor, []).append(kind)
        for name, (shape, *cut) in json.loads(file.metadata["fragments"]).items():
            entry = tensors.setdefault(name, {"shape": shape, "kinds": kinds[name], "fragments": []})
            entry["fragments"].append([number, *cut])
    for name, entry in tensors.items():
        written, numel = sum(cut[-1] for cut in entry["fragments"]), math.prod(entry["shape"])
        if written != numel:
            raise CheckpointError(
                f"{final.name}: the ranks wrote {written} values of {name}, which has {numel}",
                "every value belongs to exactly one rank's file; the layout's cuts are wrong",
                "report it with `unicom doctor` and the layout; the checkpoints written before are kept",
                DOCS,
            )
    text = json.dumps({**state, "files": files, "tensors": tensors})
    write_synced(partial / "state.json", text)
    write_synced(partial / COMPLETE, xxh3_64_hexdigest(text.encode()))
    sync_folder(partial)
    if final.exists():  # the same step again, after a resume from an older checkpoint
        shutil.rmtree(final)
    os.replace(partial, final)
    sync_folder(final.parent)


def _write_error(folder: Path, error: BaseException) -> CheckpointError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)
    return CheckpointError(
        f"a checkpoint could not be written to {folder}: {reason}",
        "the checkpoints written before are kept",
        "free space or make the folder writable; running the same command again continues",
        DOCS,
    )
