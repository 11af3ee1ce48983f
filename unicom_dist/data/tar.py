"""Shards: plain ustar archives with a side index, written whole or not at all and read through a memory map.

A sample is a run of neighbouring members that share a key: `KEY.webp`, `KEY.json`. The key ends at the first dot, as in
WebDataset, whose tools read these files. The side index `name.tar.idx` (JSON: keys, and per extension the offsets and
sizes of the contents) makes any sample reachable without scanning; it is a cache and is rebuilt when missing or stale.
Equal contents give equal bytes: owner and time stamps are zero.
"""

import contextlib
import hashlib
import json
import mmap
import os
from array import array
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

from unicom_dist.config.errors import DataError, UnicomError
from unicom_dist.config.storage import reason, write_failed
from unicom_dist.data.tarscan import BLOCK, Index, scan

INDEX_FORMAT = "unicom-tar-index/1"
Buffer = bytes | bytearray | memoryview
_REMAKE = "remove the file and run the command that wrote it again"
NOWHERE: "tuple[array[int], array[int]]" = (array("q"), array("q"))


class ShardEntry(NamedTuple):
    """What the manifest records about one shard."""

    name: str
    samples: int
    bytes: int
    sha256: str


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` under `path` so that a reader sees the old file or the whole new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # a read-only file system refuses that too
            temporary.unlink()
        raise write_failed(path, error) from error


def index_path(path: Path) -> Path:
    """Where the side index of the shard `path` is."""
    return path.with_name(path.name + ".idx")


def _template() -> bytearray:
    header = bytearray(BLOCK)
    header[100:108] = b"0000644\0"
    header[108:116] = header[116:124] = b"0000000\0"
    header[136:148] = b"00000000000\0"
    header[148:156] = b" " * 8
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    return header


_TEMPLATE = _template()
_TEMPLATE_SUM = sum(_TEMPLATE)


def _header(name: bytes, size: int) -> bytearray:
    """The 512-byte ustar header of a regular file (POSIX.1-1988, interchange format)."""
    octal = b"%011o\0" % size
    header = _TEMPLATE[:]
    header[0 : len(name)] = name
    header[124:136] = octal
    header[148:156] = b"%06o\0 " % (_TEMPLATE_SUM + sum(name) + sum(octal))
    return header


class ShardWriter:
    """Writes one shard, as a context manager: it appears under `path` only if the block ends without an error.

    After closing, `entry` holds the counts and digest for the manifest.
    """

    entry: ShardEntry

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        self._keys: dict[str, None] = {}
        self._index: dict[str, tuple[list[int], list[int]]] = {}
        self._offset = 0
        self._digest = hashlib.sha256()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = self._temporary.open("wb", buffering=1 << 20)
        except OSError as error:
            raise write_failed(self.path, error) from error

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._offset

    def write(self, key: str, members: Mapping[str, Buffer]) -> None:
        """Append the sample `key` with its {extension: content}. DataError: unusable name, key already written."""
        if not key or "." in key or "/" in key or "\\" in key or "\0" in key or key.startswith("__"):
            raise DataError(
                f"key {key!r} cannot name a sample", "a key is not empty and has no dot, slash or leading __"
            )
        if key in self._keys:
            raise DataError(f"{self.path.name}: key {key!r} is written twice", "samples are joined by key")
        number = len(self._keys)
        blocks: list[Buffer] = []
        for extension, content in members.items():
            name, size = f"{key}.{extension}".encode(), len(content)
            if len(name) > 100 or "/" in extension or not extension or size >= 8**11:
                raise DataError(
                    f"member {key}.{extension} does not fit into a ustar archive", "100 bytes of name, 8 GiB"
                )
            offsets, sizes = self._index.setdefault(extension, ([], []))
            offsets.extend([0] * (number - len(offsets)))
            sizes.extend([-1] * (number - len(sizes)))
            offsets.append(self._offset + BLOCK)
            sizes.append(size)
            padding = -size % BLOCK
            blocks += (_header(name, size), content, bytes(padding))
            self._offset += BLOCK + size + padding
        self._keys[key] = None
        self._put(b"".join(blocks))

    def close(self) -> ShardEntry:
        """Finish the archive, flush it to the disk, write the side index and give both their final names."""
        tail = bytes(2 * BLOCK)
        self._offset += len(tail)
        self._put(tail)
        for offsets, sizes in self._index.values():
            offsets.extend([0] * (len(self._keys) - len(offsets)))
            sizes.extend([-1] * (len(self._keys) - len(sizes)))
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            _write_index(self.path, self._offset, list(self._keys), self._index)
            self._temporary.replace(self.path)
        except OSError as error:
            self.abort()
            raise write_failed(self.path, error) from error
        self.entry = ShardEntry(self.path.name, len(self._keys), self._offset, self._digest.hexdigest())
        return self.entry

    def abort(self) -> None:
        """Drop what was written; nothing appears under the final name."""
        with contextlib.suppress(OSError):  # a full disk refuses the last flush too; the file goes away anyway
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _put(self, content: bytes) -> None:
        self._digest.update(content)
        try:
            self._file.write(content)
        except OSError as error:
            self.abort()
            raise write_failed(self.path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _write_index(path: Path, size: int, keys: list[str], members: dict[str, tuple[list[int], list[int]]]) -> None:
    content = {"format": INDEX_FORMAT, "tar_bytes": size, "keys": keys, "members": members}
    replace_file(index_path(path), json.dumps(content, separators=(",", ":")).encode())


def _foreign(path: Path) -> bool:
    """Whether another program keeps its own index under this name (energon does, in binary); it is left alone."""
    try:
        with path.open("rb") as file:
            return file.read(1) not in (b"", b"{")
    except OSError:
        return False


class Shard:
    """Random access to the samples of one shard. `shard[i]` is {extension: memoryview}, without copying.

    `view` is the whole file, `members` says by extension where in it each sample's content begins and how long it is.
    DataError: the file is missing, empty, cut off or unsafe (absolute or `..` names, links), or a key occurs twice.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size == 0:
                    raise DataError(f"{self.path} is empty (0 bytes)", "an archive has at least its end mark", _REMAKE)
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"cannot read {self.path}", reason(error), _REMAKE) from error
        self.view = memoryview(self._map)
        index = self._read_index(size)
        if index is None:
            index = scan(self.path, self.view)
            if not _foreign(index_path(self.path)):
                with contextlib.suppress(UnicomError):  # a read-only data folder: the index is a cache
                    _write_index(self.path, size, index[0], index[1])
        self.keys = index[0]
        # Arrays of machine integers: a fifth of the memory of lists, and one cache line instead of two per look-up.
        self.members = {e: (array("q", offsets), array("q", sizes)) for e, (offsets, sizes) in index[1].items()}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> dict[str, memoryview]:
        view = self.view
        return {
            extension: view[offsets[number] : offsets[number] + sizes[number]]
            for extension, (offsets, sizes) in self.members.items()
            if sizes[number] >= 0
        }

    def member(self, number: int, extension: str) -> memoryview:
        """The content of one member. DataError if the sample has none with this extension."""
        offsets, sizes = self.members.get(extension, NOWHERE)
        if not sizes or sizes[number] < 0:
            raise self.lacks(number, extension)
        return self.view[offsets[number] : offsets[number] + sizes[number]]

    def lacks(self, number: int, extension: str) -> DataError:
        """That a sample has no member with this extension."""
        return DataError(f"{self.path.name}: sample {self.keys[number]!r} has no .{extension} member", "", _REMAKE)

    def _read_index(self, size: int) -> Index | None:
        """The side index, or None if there is none that fits this file."""
        try:
            content: Any = json.loads(index_path(self.path).read_bytes())
            keys, members = content["keys"], {e: (o, s) for e, (o, s) in content["members"].items()}
            if content["format"] != INDEX_FORMAT or content["tar_bytes"] != size or len(set(keys)) != len(keys):
                return None
            for extension, (offsets, sizes) in members.items():
                if not len(keys) == len(offsets) == len(sizes):
                    return None
                # Two headers per extension are enough to notice an index that belongs to another file of the same size.
                for number in [i for i, s in enumerate(sizes) if s >= 0][:: max(len(sizes) - 1, 1)]:
                    name = f"{keys[number]}.{extension}".encode()
                    start = offsets[number] - BLOCK
                    if offsets[number] + sizes[number] > size or bytes(self.view[start : start + len(name)]) != name:
                        return None
            return keys, members
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
