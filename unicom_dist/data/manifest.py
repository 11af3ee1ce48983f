"""The manifest of a shard set: what is there, how much of it, and what produced it.

`manifest.json` describes images and captions, `manifest.<part>.json` what was computed from them (features, latents).
`fingerprint` identifies the producer: encoder weights, processor, resolution and precision; training compares it with
the configured one before it reads a sample.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unicom_dist.config.errors import DataError
from unicom_dist.data.tar import ShardEntry, replace_file

_DOCS = "docs/data.md"


class Manifest(BaseModel):
    """Contents and origin of one part of a shard set."""

    model_config = ConfigDict(extra="forbid")

    part: str = Field("", description="empty for images and captions, else what was computed: siglip2, latent")
    fingerprint: str = Field(description="identity of what produced the contents")
    producer: dict[str, Any] = Field(default_factory=dict, description="configuration of the producer, for the reader")
    shards: list[ShardEntry] = Field(default_factory=list)
    skipped: dict[str, str] = Field(default_factory=dict, description="keys left out, with the reason")

    @property
    def samples(self) -> int:
        """Samples over all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes over all shards."""
        return sum(shard.bytes for shard in self.shards)

    @staticmethod
    def file(folder: str | Path, part: str = "") -> Path:
        """Where the manifest of `part` is."""
        return Path(folder) / (f"manifest.{part}.json" if part else "manifest.json")

    def write(self, folder: str | Path) -> Path:
        """Write atomically into `folder` and return the file. One shard a line, so that differences can be read."""
        content = self.model_dump(exclude={"shards"})
        lines = ",\n  ".join(json.dumps(shard._asdict()) for shard in self.shards)
        head = json.dumps(content, indent=1, ensure_ascii=False)[:-2]
        path = self.file(folder, self.part)
        replace_file(path, f'{head},\n "shards": [\n  {lines}\n ]\n}}\n'.encode())
        return path

    @classmethod
    def read(cls, folder: str | Path, part: str = "") -> Self:
        """Read from `folder`. DataError if there is none or it is damaged."""
        path = cls.file(folder, part)
        try:
            content = json.loads(path.read_bytes())
            content["shards"] = [ShardEntry(**shard) for shard in content["shards"]]
            return cls.model_validate(content)
        except FileNotFoundError as error:
            command = {"": "unicom data ingest", "latent": "unicom train"}.get(part, "unicom features run")
            raise DataError(
                f"{path} does not exist", "shards without a manifest are unfinished", f"run `{command}`", _DOCS
            ) from error
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            raise DataError(
                f"{path} cannot be read", str(error).splitlines()[0], "write the shards again", _DOCS
            ) from error

    def verify(self, folder: str | Path, *, digests: bool = False) -> list[str]:
        """Differences between the manifest and the files in `folder`, one line each; `digests` reads every byte."""
        problems = []
        for shard in self.shards:
            path = Path(folder) / shard.name
            if not path.is_file():
                problems.append(f"{shard.name}: missing")
            elif path.stat().st_size != shard.bytes:
                problems.append(f"{shard.name}: {path.stat().st_size} bytes, the manifest says {shard.bytes}")
            elif digests and sha256_of(path) != shard.sha256:
                problems.append(f"{shard.name}: contents differ from the manifest's sha256")
        return problems


def latent_producer(weights: Path, encoder: str) -> dict[str, str]:
    """What makes latents: the digest of a codec's exported weights, the fingerprint of the encoder it reads."""
    return {"codec_sha256": sha256_of(weights), "encoder": encoder}


def sha256_of(path: Path) -> str:
    """Digest of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
