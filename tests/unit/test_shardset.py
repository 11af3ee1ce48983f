"""Shard sets: joining by key, missing parts, foreign fingerprints, manifests. 1 process, 1 s."""

from pathlib import Path

import pytest

from unicom_dist.config.errors import DataError
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.shardset import ShardSet
from unicom_dist.data.tar import ShardWriter


def write_part(folder: Path, part: str, shards: list[list[str]], fingerprint: str = "one") -> None:
    manifest = Manifest(part=part, fingerprint=fingerprint, producer={"kind": part or "images"})
    for number, keys in enumerate(shards):
        name = f"a-{number:06d}.{part}.tar" if part else f"a-{number:06d}.tar"
        with ShardWriter(folder / name) as writer:
            for key in keys:
                writer.write(key, {"txt": f"{part}:{key}".encode()})
        manifest.shards.append(writer.entry)
    manifest.write(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_part(tmp_path, "", [["a", "b", "c"], ["d", "e"]])
    return tmp_path


def test_samples_are_joined_by_number_and_key(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("latents")
    write_part(folder, "feat", [["a", "b", "c"], ["d", "e"]])
    write_part(elsewhere, "latent", [["a", "b", "c"], ["d", "e"]])
    pairs = ShardSet(folder, {"feat": folder, "latent": elsewhere}, {"feat": "one"})
    assert len(pairs) == 5
    assert [pairs.key(n) for n in range(5)] == list("abcde")
    for number in (4, 0, 2, 3, 1):
        sample = pairs[number]
        contents = {part: bytes(members["txt"]).decode() for part, members in sample.parts.items()}
        assert contents == {p: f"{p}:{sample.key}" for p in ("", "feat", "latent")}
    with pytest.raises(IndexError):
        pairs[5]


def test_a_sample_without_its_part_is_named_and_the_others_stay_joined(folder: Path) -> None:
    write_part(folder, "feat", [["a", "c"], ["d", "e"]])
    pairs = ShardSet(folder, {"feat": folder})
    assert bytes(pairs[2].parts["feat"]["txt"]) == b"feat:c"
    with pytest.raises(DataError, match="sample 'b' has no 'feat' part"):
        pairs[1]


@pytest.mark.parametrize("keys", [["b", "a", "c"], ["a", "b", "z"]])
def test_another_order_or_foreign_keys_are_refused(folder: Path, keys: list[str]) -> None:
    write_part(folder, "feat", [keys, ["d", "e"]])
    pairs = ShardSet(folder, {"feat": folder})
    with pytest.raises(DataError, match="do not belong together"):
        pairs[0]


def test_an_unfinished_part_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.feat\.json does not exist"):
        ShardSet(folder, {"feat": folder})
    write_part(folder, "feat", [["a", "b", "c"]])
    with pytest.raises(DataError, match="1 of 2 shards have no 'feat' part"):
        ShardSet(folder, {"feat": folder})


def test_a_wrong_fingerprint_names_both(folder: Path) -> None:
    write_part(folder, "feat", [["a", "b", "c"], ["d", "e"]], fingerprint="theirs")
    with pytest.raises(DataError, match="fingerprint theirs, the configuration's is ours"):
        ShardSet(folder, {"feat": folder}, {"feat": "ours"})


def test_a_shard_that_is_not_the_manifests_is_refused(folder: Path) -> None:
    with ShardWriter(folder / "a-000000.tar") as writer:
        writer.write("a", {"txt": b""})
    with pytest.raises(DataError, match="holds 1 samples, its manifest says 3"):
        ShardSet(folder)[0]


def test_a_shard_that_vanished_is_named(folder: Path) -> None:
    (folder / "a-000001.tar").unlink()
    with pytest.raises(DataError, match=r"cannot read .*a-000001\.tar"):
        ShardSet(folder)[4]
