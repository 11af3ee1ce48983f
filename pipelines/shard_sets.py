"""A shard set as ingest leaves it: what it holds, and whether the one that is there is the one that is wanted."""

import hashlib
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.pictures import Stored
from unicom_dist.config.errors import DataError
from unicom_dist.config.schema import DataConfig
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.sizes import shard_sizes
from unicom_dist.data.tar import ShardEntry, ShardWriter

log = logging.getLogger(__name__)
DOCS = "docs/data.md"


@dataclass
class SetSummary:
    """What one shard set holds, and what was left out of it."""

    name: str
    samples: int
    shards: int
    bytes: int
    reused: bool
    skipped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, reused: bool) -> "SetSummary":
        """Of the finished set in `folder`."""
        manifest = Manifest.read(folder)
        return cls(folder.name, manifest.samples, len(manifest.shards), manifest.bytes, reused, manifest.skipped)

    def line(self) -> str:
        """One line for the screen."""
        state = "already there" if self.reused else "written"
        text = f"{self.name}: {self.samples} samples in {self.shards} shards, {self.bytes / 1e6:.1f} MB, {state}"
        if self.skipped:
            some = "; ".join(f"{key}: {reason}" for key, reason in itertools.islice(self.skipped.items(), 3))
            text += f"; {len(self.skipped)} skipped ({some}{'; …' if len(self.skipped) > 3 else ''})"
        return text


def is_held_out(key: str, share: float) -> bool:
    """Whether a key is kept for evaluation: the first 8 bytes of its sha256 as a fraction are below `share`."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < share * 2**64


def check_bad(bad: dict[str, str], total: int, data: DataConfig, where: str) -> None:
    """DataError when more than the share data.max_bad_fraction of `total` samples is `bad` {key: reason}."""
    if len(bad) > data.max_bad_fraction * total:
        some = "; ".join(f"{key}: {reason}" for key, reason in itertools.islice(bad.items(), 5))
        raise DataError(
            f"{len(bad)} of {total} samples {where} are unusable, data.max_bad_fraction = {data.max_bad_fraction}",
            some,
            "mend or remove them, or raise data.max_bad_fraction to skip that many",
            DOCS,
        )


def write_shard(folder: Path, name: str, samples: Sequence[Stored]) -> ShardEntry:
    """One shard and what belongs to it, for the manifest."""
    with ShardWriter(folder / name) as writer:
        for sample in samples:
            writer.write(sample.key, sample.members)
    shard_sizes(folder, writer.entry)
    return writer.entry


def fingerprint(producer: dict[str, Any]) -> str:
    """Identity of what a set was made from."""
    return hashlib.sha256(repr(sorted(producer.items())).encode()).hexdigest()[:32]


def existing(folder: Path, producer: dict[str, Any]) -> Manifest | None:
    """The manifest of a finished set, None if there is none. DataError if it was made from something else."""
    if not Manifest.file(folder).is_file():
        return None
    manifest = Manifest.read(folder)
    if manifest.fingerprint != fingerprint(producer):
        differing = [
            f"{name} was {manifest.producer.get(name)!r}, now {value!r}"
            for name, value in producer.items()
            if manifest.producer.get(name) != value
        ]
        raise DataError(
            f"{folder} holds shards of another source or other settings",
            "; ".join(differing) or "the manifest is of another version",
            f"remove {folder} to make them again, or set data.path to another folder",
            DOCS,
        )
    problems = manifest.verify(folder)
    if problems:
        log.warning("%s: %s; making the set again", folder, problems[0])
        return None
    return manifest
