"""Manifests: round trip, differences from the files, damaged files. 1 process, 1 s."""

from pathlib import Path

import pytest

from unicom_dist.config.errors import DataError
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.tar import ShardWriter


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    made = Manifest(part="feat", fingerprint="f", producer={"kind": "x", "px": 3}, skipped={"k": "bad image"})
    for number in range(2):
        with ShardWriter(tmp_path / f"a-{number}.feat.tar") as writer:
            writer.write("k", {"txt": bytes(number * 600)})
        made.shards.append(writer.entry)
    return made


def test_reading_gives_what_was_written(tmp_path: Path, manifest: Manifest) -> None:
    manifest.write(tmp_path)
    again = Manifest.read(tmp_path, "feat")
    assert again == manifest
    assert again.samples == 2
    assert again.bytes == sum((tmp_path / shard.name).stat().st_size for shard in again.shards)


def test_a_manifest_without_shards_survives_too(tmp_path: Path) -> None:
    Manifest(fingerprint="f").write(tmp_path)
    assert Manifest.read(tmp_path) == Manifest(fingerprint="f")


def test_every_difference_is_listed(tmp_path: Path, manifest: Manifest) -> None:
    assert manifest.verify(tmp_path, digests=True) == []
    first, second = (tmp_path / shard.name for shard in manifest.shards)
    content = bytearray(second.read_bytes())
    content[600] ^= 1
    second.write_bytes(content)
    assert manifest.verify(tmp_path) == []
    assert manifest.verify(tmp_path, digests=True) == ["a-1.feat.tar: contents differ from the manifest's sha256"]
    second.write_bytes(content[:512])
    first.unlink()
    assert [line.split(",")[0] for line in manifest.verify(tmp_path)] == [
        "a-0.feat.tar: missing",
        "a-1.feat.tar: 512 bytes",
    ]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"shards": []}', '{"fingerprint": "f", "shards": [{"name": 1}]}'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match="cannot be read"):
        Manifest.read(tmp_path)
