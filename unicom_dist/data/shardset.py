"""A shard set: the shards of one folder and what was computed from them, joined by key, reachable by sample number.

`ShardSet("data/emoji/train", {"siglip2": "data/emoji/train", "latent": "runs/a/latents/train"})` reads
`name-000000.tar`, `name-000000.siglip2.tar` and `name-000000.latent.tar` side by side. A computed part keeps the order
of the images and may lack some of them (an image the encoder could not read); any other difference is refused.
Shards are opened when first needed, so that opening a set costs one manifest per part.
"""

import itertools
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from unicom_dist.config.errors import DataError
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.tar import NOWHERE, Shard

_DOCS = "docs/data.md"
_OPEN_SHARDS = 1024  # memory maps kept, the one opened first is closed first


class Sample(NamedTuple):
    """Key and {part: {extension: content}}; the part "" holds image and caption."""

    key: str
    parts: dict[str, dict[str, memoryview]]


class _Joined(NamedTuple):
    base: Shard
    parts: dict[str, tuple[Shard, list[int] | None]]  # the shard, and its sample numbers if it lacks some (-1)


def part_name(name: str, part: str) -> str:
    """File name of the shard of `part` that belongs to the image shard `name`."""
    return f"{name.removesuffix('.tar')}.{part}.tar" if part else name


class ShardSet:
    """Random access to joined samples. DataError: unfinished part, foreign fingerprint, foreign keys."""

    def __init__(
        self,
        folder: str | Path,
        parts: Mapping[str, str | Path] | None = None,
        expect_fingerprint: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.parts = {part: Path(where) for part, where in (parts or {}).items()}
        self.manifest = Manifest.read(self.folder)
        self.part_manifests = {part: Manifest.read(where, part) for part, where in self.parts.items()}
        for part, expected in (expect_fingerprint or {}).items():
            self._check_fingerprint(part, expected)
        for part, manifest in self.part_manifests.items():
            there = {shard.name for shard in manifest.shards}
            lacking = [s.name for s in self.manifest.shards if part_name(s.name, part) not in there]
            if lacking:
                raise DataError(
                    f"{self.parts[part]}: {len(lacking)} of {len(self.manifest.shards)} shards have no {part!r} part",
                    f"the first is {lacking[0]}",
                    "run the command that computes it again; it continues where it stopped",
                    _DOCS,
                )
        self._starts = [0, *itertools.accumulate(shard.samples for shard in self.manifest.shards)]
        self._open: OrderedDict[int, _Joined] = OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, number: int) -> Sample:
        shard, row = self._locate(number)
        joined = self._joined(shard)
        key = joined.base.keys[row]
        members = {"": joined.base[row]}
        for part, (other, rows) in joined.parts.items():
            other_row = row if rows is None else rows[row]
            if other_row < 0:
                raise self._left_out(shard, key, part)
            members[part] = other[other_row]
        return Sample(key, members)

    def columns(self, numbers: Iterable[int], *extensions: str, part: str = "") -> list[list[memoryview]]:
        """The members of some samples, a list per extension; faster than `self[number]`. DataError: one is missing."""
        columns: list[list[memoryview]] = [[] for _ in extensions]
        wanted = [(column.append, extension) for column, extension in zip(columns, extensions, strict=True)]
        starts, opened, last = self._starts, self._open, len(self) - 1
        for number in numbers:
            if not 0 <= number <= last:
                raise IndexError(number)
            shard = bisect_right(starts, number) - 1
            row = number - starts[shard]
            source, parts = opened.get(shard) or self._joined(shard)
            if part:
                base, (source, rows) = source, parts[part]
                if rows is not None:
                    if rows[row] < 0:
                        raise self._left_out(shard, base.keys[row], part)
                    row = rows[row]
            view, members = source.view, source.members
            for append, extension in wanted:  # `source.member`, without the calls
                offsets, sizes = members.get(extension, NOWHERE)
                if not sizes or sizes[row] < 0:
                    raise source.lacks(row, extension)
                start = offsets[row]
                append(view[start : start + sizes[row]])
        return columns

    def key(self, number: int) -> str:
        """Key of a sample."""
        shard, row = self._locate(number)
        return self._joined(shard).base.keys[row]

    def keys(self) -> Iterator[str]:
        """Keys of all samples, in order."""
        for shard in range(len(self.manifest.shards)):
            yield from self._joined(shard).base.keys

    def _left_out(self, shard: int, key: str, part: str) -> DataError:
        return DataError(
            f"{self.manifest.shards[shard].name}: sample {key!r} has no {part!r} part",
            "it was left out when the part was computed",
            f"see `skipped` in {Manifest.file(self.parts[part], part).name}",
            _DOCS,
        )

    def _locate(self, number: int) -> tuple[int, int]:
        shard = bisect_right(self._starts, number) - 1
        if not 0 <= shard < len(self._starts) - 1:
            raise IndexError(number)
        return shard, number - self._starts[shard]

    def _joined(self, number: int) -> _Joined:
        joined = self._open.get(number)
        if joined is None:
            joined = self._open[number] = self._open_shard(number)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return joined

    def _open_shard(self, number: int) -> _Joined:
        entry = self.manifest.shards[number]
        base = Shard(self.folder / entry.name)
        if len(base) != entry.samples:
            raise DataError(
                f"{base.path} holds {len(base)} samples, its manifest says {entry.samples}",
                "the manifest belongs to another file",
                "write the shards again",
                _DOCS,
            )
        parts: dict[str, tuple[Shard, list[int] | None]] = {}
        for part, where in self.parts.items():
            other = Shard(where / part_name(entry.name, part))
            parts[part] = (other, None if other.keys == base.keys else _subsequence(base, other))
        return _Joined(base, parts)

    def _check_fingerprint(self, part: str, expected: str) -> None:
        manifest = self.part_manifests[part] if part else self.manifest
        if manifest.fingerprint != expected:
            where = Manifest.file(self.parts.get(part, self.folder), part)
            raise DataError(
                f"{where}: fingerprint {manifest.fingerprint}, the configuration's is {expected}",
                f"the {part or 'image'!r} part was made by something else: {manifest.producer or 'unknown'}",
                "compute it again with this configuration, or configure what it was made with",
                _DOCS,
            )


def _subsequence(base: Shard, other: Shard) -> list[int]:
    """For each sample of `base` its number in `other` or -1. DataError if `other` has foreign keys or another order."""
    numbers = {key: number for number, key in enumerate(other.keys)}
    rows = [numbers.pop(key, -1) for key in base.keys]
    found = [row for row in rows if row >= 0]
    if numbers or found != sorted(found):
        stray = f"key {next(iter(numbers))!r} is in the second only" if numbers else "the order of the keys differs"
        raise DataError(
            f"{base.path.name} and {other.path.name} do not belong together",
            stray,
            "compute the part again from these shards",
            _DOCS,
        )
    return rows
