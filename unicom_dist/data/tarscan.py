"""Reads the headers of a tar archive and lists its samples: what the side index is rebuilt from.

Understands ustar, GNU long names and pax paths, so that shards of other WebDataset tools can be read. Members are never
extracted; names that would leave the folder, links and devices are refused all the same: other tools may extract them.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from unicom_dist.config.errors import DataError

BLOCK = 512
_SAMPLE_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")
_REMAKE = "write the shard again; `unicom data check` lists every damaged one"
Index = tuple[list[str], dict[str, tuple[list[int], list[int]]]]


def scan(path: Path, view: memoryview) -> Index:
    """Keys, and per extension offsets and sizes (-1: none) of the samples in `view`. DataError: damaged, unsafe."""
    keys: list[str] = []
    seen: set[str] = set()
    members: dict[str, tuple[list[int], list[int]]] = {}
    for name, offset, size in _members(path, view):
        match = _SAMPLE_NAME.match(name)
        if match is None or name.rsplit("/", 1)[-1].startswith("__"):
            continue  # WebDataset ignores names without an extension and dunder names, too
        key, extension = match.groups()
        if not keys or keys[-1] != key:
            if key in seen:
                raise DataError(f"{path}: key {key!r} occurs twice", "samples are joined by key", _REMAKE)
            seen.add(key)
            keys.append(key)
        offsets, sizes = members.setdefault(extension, ([], []))
        if len(sizes) == len(keys):
            raise DataError(f"{path}: member {name!r} occurs twice", "a sample has one member per extension", _REMAKE)
        offsets.extend([0] * (len(keys) - 1 - len(offsets)))
        sizes.extend([-1] * (len(keys) - 1 - len(sizes)))
        offsets.append(offset)
        sizes.append(size)
    for offsets, sizes in members.values():
        offsets.extend([0] * (len(keys) - len(offsets)))
        sizes.extend([-1] * (len(keys) - len(sizes)))
    return keys, members


def _members(path: Path, view: memoryview) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of every regular file, in order. DataError: damaged, unsafe, or no archive at all."""
    try:
        yield from _entries(path, view)
    except (ValueError, IndexError) as error:  # numbers that are none
        raise DataError(f"{path} is damaged or no tar archive", str(error), _REMAKE) from error


def _entries(path: Path, view: memoryview) -> Iterator[tuple[str, int, int]]:
    position, long_name = 0, ""
    while True:
        header = bytes(view[position : position + BLOCK])
        if len(header) < BLOCK:
            raise DataError(f"{path} is cut off at byte {len(view)}", "the archive has no end mark", _REMAKE)
        if not any(header):
            return
        if int(header[148:156].strip(b" \0") or b"0", 8) != sum(header) - sum(header[148:156]) + 8 * 32:
            raise DataError(f"{path} is damaged at byte {position}", "the checksum of a header is wrong", _REMAKE)
        size, kind = _number(header[124:136]), header[156:157]
        offset = position + BLOCK
        position = offset + size + (-size % BLOCK)
        if offset + size > len(view):
            raise DataError(
                f"{path} is cut off at byte {len(view)}", f"a member should reach to byte {offset + size}", _REMAKE
            )
        if kind == b"L":
            long_name = bytes(view[offset : offset + size]).rstrip(b"\0").decode(errors="replace")
        elif kind == b"x":
            long_name = _pax_path(bytes(view[offset : offset + size])) or long_name
        elif kind in (b"g", b"5"):
            continue
        elif kind in (b"0", b"\0"):
            name, long_name = long_name or _name(header), ""
            parts = PurePosixPath(name).parts
            if name.startswith("/") or ".." in parts or "\0" in name or "\\" in name:
                raise DataError(
                    f"{path}: member {name!r} points outside the archive", "such a name is refused", _REMAKE
                )
            yield name.removeprefix("./"), offset, size
        else:
            raise DataError(f"{path}: member {_name(header)!r} is a link or a device", "only files are read", _REMAKE)


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU: binary, big-endian, for sizes of 8 GiB and more
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0].decode(errors="replace")
    prefix = header[345:500].split(b"\0", 1)[0].decode(errors="replace") if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _pax_path(records: bytes) -> str:
    """The `path` of a pax extended header: records `LENGTH key=value\\n`."""
    path = ""
    while records:
        length = int(records.split(b" ", 1)[0] or b"0")
        if length <= 0:
            break
        key, _, value = records[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
        if key == b"path":
            path = value.decode(errors="replace")
        records = records[length:]
    return path
