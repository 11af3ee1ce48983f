"""Reading a checkpoint under any layout: each rank finds the parts of its fragments in whichever files hold them.

state.json says for every tensor of the model where its fragments lie, so a rank opens the files it needs and no others.
Equal cuts are read straight into place; differing ones by the rectangles they share (`overlap`). What is read is held
against the digests that were written with it.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from xxhash import xxh3_64_hexdigest

from unicom_dist.checkpoint.overlap import shared
from unicom_dist.checkpoint.tensorfile import TensorFile
from unicom_dist.config.errors import CheckpointError
from unicom_dist.config.layout import Layout
from unicom_dist.config.storage import reason
from unicom_dist.parallel.engine import Buffers, Fragment, Piece
from unicom_dist.parallel.mesh import Mesh

COMPLETE = "COMPLETE"
FORMAT = 2
DOCS = "docs/checkpoints.md"
State = dict[str, Buffers]


def rank_file(rank: int, world: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def layout_of(layout: Layout) -> dict[str, int]:
    """What state.json says about the layout."""
    return {**layout.sizes(), "zero_stage": layout.zero_stage}


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a stage, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / COMPLETE).is_file())


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a stage, or None."""
    found = checkpoints(folder)
    return found[-1] if found else None


def remedy(path: Path) -> str:
    """What to do about the damaged checkpoint `path`."""
    before = [other.name for other in checkpoints(path.parent) if other.name < path.name]
    if before:
        return f"remove {path} to continue from {before[-1]}, which is complete"
    return f"remove {path} to begin the stage anew: no checkpoint before it is left"


class Checkpoint:
    """A complete checkpoint. CheckpointError when it is incomplete, foreign, or a file that is needed is damaged.

    `state`: the content of state.json. `shapes`, `kinds`: of the tensors of the whole model, by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / COMPLETE).is_file():
            raise CheckpointError(
                f"{path} is not a checkpoint", "it has no COMPLETE file", "name a folder step-… that has one", DOCS
            )
        try:
            text, digest = (path / "state.json").read_bytes(), (path / COMPLETE).read_text(encoding="ascii")
            self.state: dict[str, Any] = json.loads(text)
            if self.state["format"] != FORMAT:
                raise ValueError(f"format {self.state['format']}, this version reads {FORMAT}")
            self.step = int(self.state["step"])
            self._files: list[list[Any]] = self.state["files"]
            self._tensors: dict[str, dict[str, Any]] = self.state["tensors"]
            self.shapes = {name: tuple(entry["shape"]) for name, entry in self._tensors.items()}
            self.kinds = {name: tuple(entry["kinds"]) for name, entry in self._tensors.items()}
            if digest and digest != xxh3_64_hexdigest(text):
                raise ValueError("it is not what was written: it changed on the disk")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}/state.json cannot be used",
                f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else reason(error),
                remedy(path),
                DOCS,
            ) from None
        self.all_kinds = list(dict.fromkeys(kind for kinds in self.kinds.values() for kind in kinds))
        self._open: dict[int, TensorFile] = {}

    def file(self, number: int) -> TensorFile:
        """A rank's file, checked to be the one that was written with this checkpoint."""
        if number not in self._open:
            name, size, digest = self._files[number]
            file = TensorFile(self.path / name, remedy(self.path))
            if (file.size, file.digest) != (size, digest):
                differs = f"{file.size} bytes instead of {size}" if file.size != size else "its header is another one"
                raise file.damaged(f"it is not the file that was written with this checkpoint: {differs}")
            self._open[number] = file
        return self._open[number]

    def fragments(self, name: str) -> Iterator[tuple[int, Fragment]]:
        """(number of the file, fragment) of a tensor."""
        shape = self.shapes[name]
        for number, dim, begin, length, offset, numel in self._tensors[name]["fragments"]:
            yield number, Fragment(Piece(name, shape, dim, begin, length), offset, numel, 0, 0)

    def fill(self, wanted: Iterable[tuple[Fragment, Mapping[str, Tensor], int]]) -> None:
        """Read the values of fragments: each into {kind: buffer [n], contiguous on the CPU} from an index on."""
        reads = []
        for f, buffers, at in wanted:
            found = 0
            for number, saved in self.fragments(f.name):
                file = None
                for part in shared(saved, f):
                    file, found = file or self.file(number), found + part.numel
                    for kind, buffer in buffers.items():
                        name, start = f"{kind}/{f.name}", at + part.target
                        if part.consecutive:
                            position = file.position(name, part.source, part.numel, buffer.dtype)
                            reads.append(_Read(number, position, start, part.numel, buffer))
                        else:
                            place = buffer[start:].as_strided((part.rows, part.columns), (part.target_pitch, 1))
                            file.read_columns(name, part.source, part.source_pitch, place)
            if found != f.numel:
                raise CheckpointError(
                    f"{self.path} holds {found} of {f.numel} values of {f.name}",
                    "its state.json does not describe one whole model",
                    remedy(self.path),
                    DOCS,
                )
        for read in _merged(reads):
            self.file(read.number).read_at(read.position, read.buffer[read.start : read.start + read.numel])

    def check(self, wanted: Mapping[str, tuple[int, ...]], further: Callable[[str], bool]) -> None:
        """CheckpointError unless it holds tensors of these names and shapes, and no others but `further` ones."""
        saved = {name: shape for name, shape in self.shapes.items() if name in wanted or not further(name)}
        differing = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
        if differing:
            first = differing[0]
            has, needs = (list(shapes[first]) if first in shapes else "absent" for shapes in (saved, wanted))
            raise CheckpointError(
                f"{self.path} holds another model: {first}: {has} saved, {needs} configured",
                f"{len(differing)} of {len(wanted)} parameters differ in name or shape",
                "undo the change of the model's configuration, or choose another run_dir",
                DOCS,
            )

    def tensors(self, kind: str) -> "SavedTensors":
        """The whole tensors of a kind ("weight", "ema", …), read one at a time when they are asked for."""
        return SavedTensors(self, kind)


class _Read(NamedTuple):
    """Consecutive elements of a file: `buffer[start : start + numel]` is what lies from byte `position` on."""

    number: int
    position: int
    start: int
    numel: int
    buffer: Tensor


def _merged(reads: list[_Read]) -> Iterator[_Read]:
    """In the order of the files, and as one where both sides go on: under an equal layout few are left."""
    reads.sort(key=itemgetter(0, 1))
    first = 0
    while first < len(reads):
        number, position, start, numel, buffer = reads[first]
        size, first = buffer.element_size(), first + 1
        while first < len(reads):
            follows = reads[first]
            if follows.buffer is not buffer or follows.number != number:
                break
            if (follows.position, follows.start) != (position + numel * size, start + numel):
                break
            numel, first = numel + follows.numel, first + 1
        yield _Read(number, position, start, numel, buffer)


class SavedTensors(Mapping[str, Tensor]):
    """See `Checkpoint.tensors`. Memory: the tensors that the caller keeps."""

    def __init__(self, checkpoint: Checkpoint, kind: str) -> None:
        self._checkpoint, self._kind = checkpoint, kind
        self._names = [name for name, kinds in checkpoint.kinds.items() if kind in kinds]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        whole = torch.empty(self._checkpoint.shapes[name])
        everything = Fragment(Piece(name, tuple(whole.shape)), 0, whole.numel(), 0, 0)
        self._checkpoint.fill([(everything, {self._kind: whole.view(-1)}, 0)])
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_extra(checkpoint: Path) -> dict[str, Any]:
    """What was given as `extra` when it was saved, and "step", "layout". CheckpointError as `Checkpoint`."""
    return Checkpoint(checkpoint).state


def read_state(checkpoint: Path, fragments: list[Fragment], like: State, kinds: tuple[str, ...]) -> State:
    """CPU buffers shaped as `like`, filled with this rank's fragments, whatever layout wrote the checkpoint.

    A kind that a tensor lacks (the moments of one that was frozen) stays zero.
    CheckpointError when a tensor is missing or has another shape, or a file is damaged.
    """
    saved = Checkpoint(checkpoint)
    saved.check(_shapes(fragments), lambda name: True)
    sizes = [buffer.numel() for kind in kinds for buffer in like[kind]]
    views = iter(torch.split(torch.empty(sum(sizes)), sizes))
    result: State = {kind: [next(views) for _ in like[kind]] for kind in kinds}
    wanted = []
    for f in fragments:
        held = {kind: result[kind][f.group] for kind in kinds if kind in saved.kinds[f.name]}
        wanted.append((f, {kind: buffer for kind, buffer in held.items() if buffer.numel()}, f.start))
    saved.fill(wanted)
    for kind, buffers in result.items():
        for group, buffer in enumerate(buffers):
            _clear(buffer, [f for f in fragments if f.group == group and kind in saved.kinds[f.name]])
    return result


def _clear(buffer: Tensor, filled: list[Fragment]) -> None:
    """Zero what no fragment fills; a whole buffer that starts as zeros would be written twice."""
    end = 0
    for f in sorted(filled, key=lambda f: f.start) if buffer.numel() else []:
        if f.start > end:
            buffer[end : f.start] = 0
        end = max(end, f.start + f.numel)
    buffer[end:] = 0


def check_model(
    checkpoint: Path, fragments: list[Fragment], mesh: Mesh, begins: Callable[[str], bool] = lambda name: False
) -> None:
    """CheckpointError unless the tensors are those of the whole model, no more and no less. Collective over pp.

    `begins`: names of tensors that are not wanted, whether the checkpoint has them or not.
    """
    parts = [_shapes(fragments)]
    if mesh.pp.size > 1:
        parts *= mesh.pp.size
        dist.all_gather_object(parts, parts[0], group=mesh.pp.group)
    wanted = {name: shape for part in parts for name, shape in part.items()}
    Checkpoint(checkpoint).check(wanted, begins)


def read_rng(checkpoint: Path, mesh: Mesh) -> Tensor | None:
    """This rank's random state, when the checkpoint was written under the same layout; else None."""
    saved = Checkpoint(checkpoint)
    if saved.state["layout"] != layout_of(mesh.layout):
        return None
    file = saved.file(mesh.rank)
    return file.read("rng/torch") if "rng/torch" in file else None


def _shapes(fragments: list[Fragment]) -> dict[str, tuple[int, ...]]:
    return {f.name: f.piece.shape for f in fragments}
