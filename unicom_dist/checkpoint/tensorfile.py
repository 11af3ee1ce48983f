"""Safetensors files written tensor by tensor and read in pieces: memory never holds more than what is asked for.

The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}} padded with spaces,
the data. Checkpoints also keep a digest of every 64 KiB of data in the header's metadata: what is read is held against
them, so that a byte that changed on the disk or on the way is found.
Written here because the library's writer wants all tensors at once and turns each into a bytes object first; read here
because its slices are new tensors, and a checkpoint's bytes belong at their place in a buffer that is there.
Ref: https://github.com/huggingface/safetensors (format section).
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from xxhash import xxh3_64, xxh3_64_hexdigest

from unicom_dist.checkpoint.direct import BLOCK, DirectFile
from unicom_dist.config.errors import CheckpointError
from unicom_dist.config.storage import reason

_NAMES = {torch.float32: "F32", torch.uint8: "U8", torch.int64: "I64", torch.bfloat16: "BF16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_ENTRY_BYTES = 224  # of the header, beside the name: eight dimensions and two offsets of thirteen digits fit
_BLOCK_BYTES = 1 << 20  # at a time, so that they are still in the processor's cache for what comes next
DIGEST_OF = 1 << 16  # bytes of data: the least that is read where a cut wants less
DIGESTS = f"xxh3_64 of {DIGEST_OF}"  # key of the metadata: the digests of every so many bytes, one after the other
_DIGITS = 16  # of a digest, hexadecimal


class TensorWriter:
    """A context manager that writes tensors in the order in which they come; synced to disk when it is left.

    The header's room is reserved for `names` (no others may come); it is filled in last, so that a file whose writer
    was killed has none. `checked`: how many bytes of data will come, to keep digests of them; 0: none are kept.
    OSError when there is no space.
    """

    def __init__(self, path: Path, names: Collection[str], metadata: Mapping[str, str], checked: int = 0) -> None:
        self._header: dict[str, Any] = {"__metadata__": dict(metadata)}
        self._digests = _Digests() if checked else None
        if checked:
            self._header["__metadata__"][DIGESTS] = "0" * _DIGITS * -(-checked // DIGEST_OF)
        entries = sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
        room = len(json.dumps(self._header).encode()) + entries
        self._room = room + -(8 + room) % BLOCK
        self._end = 0
        self._file = DirectFile(path, 8 + self._room)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor from wherever it is."""
        start, self._end = self._end, self._end + tensor.numel() * tensor.element_size()
        shape, dtype = list(tensor.shape), _NAMES[tensor.dtype]
        self._header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, self._end]}
        if tensor.numel():
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            for begin in range(0, len(data), _BLOCK_BYTES):
                part = data[begin : begin + _BLOCK_BYTES]
                if self._digests:
                    self._digests.update(part.data)
                self._file.append(part)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._file.__exit__(kind, error, trace)
            return
        with self._file as file:
            if self._digests:
                self._header["__metadata__"][DIGESTS] = self._digests.text()
            text = json.dumps(self._header, separators=(",", ":")).encode()
            if len(text) > self._room:
                raise ValueError(f"{len(text)} bytes of header, {self._room} reserved")
            header = self._room.to_bytes(8, "little") + text.ljust(self._room)
            file.seek(0)
            file.append(np.frombuffer(header, np.uint8))


class _Digests:
    """Of a stream of bytes, one for every DIGEST_OF of them."""

    def __init__(self) -> None:
        self._hash, self._left = xxh3_64(), DIGEST_OF
        self._found: list[str] = []

    def update(self, data: memoryview) -> None:
        """Take account of `data`, which comes next."""
        while data:
            part, data = data[: self._left], data[self._left :]
            self._hash.update(part)
            self._left -= len(part)
            if not self._left:
                self._found.append(self._hash.hexdigest())
                self._hash, self._left = xxh3_64(), DIGEST_OF

    def text(self) -> str:
        """All of them, the last of what is left over."""
        rest = [self._hash.hexdigest()] if self._left < DIGEST_OF else []
        return "".join(self._found + rest)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors, with digests, to a file that is on disk when this returns. OSError when there is no space."""
    with TensorWriter(path, tensors.keys(), metadata, sum(tensor.nbytes for tensor in tensors.values())) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)


class TensorFile:
    """A safetensors file opened for reading; the header alone is read at once. CheckpointError when it is damaged.

    `digest`: SHA-256 of the header, which names a file's content without reading it. `size`: bytes of the file.
    `remedy`: what to do when it is damaged.
    """

    def __init__(self, path: Path, remedy: str = "") -> None:
        self.path, self._descriptor = path, -1
        self._block = np.empty(0, np.uint8)
        self._remedy = remedy or f"remove {path.parent} to continue from the checkpoint before it"
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            self.size = os.fstat(self._descriptor).st_size
            length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
            if not 2 <= length <= self.size - 8:
                raise ValueError("the header is missing: its writer did not finish, or it is another kind of file")
            text = os.pread(self._descriptor, length, 8)
            header = json.loads(text)
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self._data = 8 + length
            self._digests: str = self.metadata.pop(DIGESTS, "")
            ends = [int(entry["data_offsets"][1]) for entry in header.values()]
            if self._data + max(ends, default=0) != self.size:
                raise ValueError(f"{self.size} bytes, its header describes {self._data + max(ends, default=0)}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self.damaged(reason(error)) from None
        self._entries: dict[str, dict[str, Any]] = header
        self._held = 0, 0  # bytes of the file that are in the block
        self.digest = hashlib.sha256(text).hexdigest()

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """Of its tensors."""
        return list(self._entries)

    def damaged(self, reason: str) -> CheckpointError:
        """The error to raise for this file."""
        return CheckpointError(f"{self.path} cannot be read", reason, self._remedy, "docs/checkpoints.md")

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        entry = self._entries[name]
        tensor = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])
        self.read_at(self.position(name, 0, tensor.numel(), tensor.dtype), tensor.view(-1))
        return tensor

    def position(self, name: str, start: int, numel: int, dtype: torch.dtype) -> int:
        """Byte at which elements [start, start + numel) of the flattened tensor begin in the file."""
        entry = self._entries.get(name)
        if entry is None:
            raise self.damaged(f"there is no {name}")
        first, end = entry["data_offsets"]
        if _DTYPES.get(entry["dtype"]) != dtype or (start + numel) * dtype.itemsize > end - first:
            asked = f"elements up to {start + numel} of {dtype}"
            raise self.damaged(f"{name} is {entry['dtype']} {entry['shape']}, wanted are {asked}")
        return int(self._data + first + start * dtype.itemsize)

    def read_at(self, position: int, target: Tensor) -> None:
        """Fill `target` [n], contiguous on the CPU, with what lies from byte `position` on.

        CheckpointError when it is not what was written, of which there are digests in checkpoints.
        """
        room = memoryview(target.view(torch.uint8).numpy())  # type: ignore[arg-type]
        while room and self._digests:
            number, before = divmod(position - self._data, DIGEST_OF)
            whole = 0 if before else min(len(room), _BLOCK_BYTES) // DIGEST_OF * DIGEST_OF
            part = room[: whole or DIGEST_OF - before]
            if whole:
                self._read(position, part)
                self._check(number, part)
            else:
                part[:] = self._around(position, len(part)).data
            room, position = room[len(part) :], position + len(part)
        self._read(position, room)

    def _around(self, position: int, count: int) -> NDArray[np.uint8]:
        """`count` bytes from `position` on, in a buffer that the next call overwrites. All their digests are checked.

        What was read around them stays there: it is often what is wanted next.
        """
        number, before = divmod(position - self._data, DIGEST_OF if self._digests else 1)
        first, end = position - before, position + count
        if self._digests:
            end = min(end + -(end - self._data) % DIGEST_OF, self.size)
        if not self._held[0] <= first <= end <= self._held[1]:
            if self._block.size < end - first:  # kept: fresh memory costs more than the copy
                self._block = np.empty(end - first, np.uint8)
            room, self._held = self._block.data[: end - first], (0, 0)
            self._read(first, room)
            self._check(number, room if self._digests else room[:0])
            self._held = first, end
        return self._block[position - self._held[0] :][:count]

    def _check(self, number: int, data: memoryview) -> None:
        """Hold data against its digests, the first of which is `number`."""
        for begin in range(0, len(data), DIGEST_OF):
            part, at = data[begin : begin + DIGEST_OF], (number + begin // DIGEST_OF) * _DIGITS
            if xxh3_64_hexdigest(part) != self._digests[at : at + _DIGITS]:
                first = self._data + number * DIGEST_OF + begin
                place = f"bytes {first} to {first + len(part)}"
                raise self.damaged(f"{place} are not what was written: they changed on the disk")

    def _read(self, position: int, room: memoryview) -> None:
        while room:
            try:
                count = os.preadv(self._descriptor, [room], position)
            except OSError as error:
                raise self.damaged(reason(error)) from None
            if not count:
                raise self.damaged("the file ends early")
            room, position = room[count:], position + count

    def read_columns(self, name: str, start: int, pitch: int, target: Tensor) -> None:
        """Fill `target` [rows, columns] with rows of the flattened tensor that begin at `start`, `pitch` apart.

        Reads blocks of rows that stay in the processor's cache, or the columns alone where rows are long.
        """
        rows, columns = target.shape
        at_once = max(1, _BLOCK_BYTES // (pitch * target.element_size()))
        first = self.position(name, start, (rows - 1) * pitch + columns, target.dtype)
        place = target.view(torch.uint8).numpy()  # bytes: what is read need not begin where a number could
        width, step = place.shape[1], pitch * target.element_size()
        for row in range(0, rows, at_once):
            count = min(at_once, rows - row)
            block = self._around(first + row * step, (count - 1) * step + width)
            place[row : row + count] = np.ndarray((count, width), np.uint8, block, strides=(step, 1))


def write_synced(path: Path, text: str) -> None:
    """A small text file that is on disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Put the names in a folder on disk: a file that is synced may still be lost with its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
