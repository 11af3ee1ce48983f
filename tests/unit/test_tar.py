"""Shards are read by us, tarfile and webdataset; what is damaged or unsafe is refused. 1 process, 2 s."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from unicom_dist.config.errors import DataError, PreflightError
from unicom_dist.data.tar import Shard, ShardWriter, index_path

KEYS = st.lists(st.from_regex(r"[a-z0-9][a-z0-9-]{0,8}", fullmatch=True), unique=True, min_size=1, max_size=8)
MEMBERS = st.dictionaries(st.sampled_from(["webp", "json", "features.npy"]), st.binary(max_size=1500), min_size=1)


def write(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with ShardWriter(path) as writer:
        for key, members in samples.items():
            writer.write(key, members)


def read(shard: Shard) -> dict[str, dict[str, bytes]]:
    return {key: {e: bytes(m) for e, m in shard[n].items()} for n, key in enumerate(shard.keys)}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_samples_come_back_with_and_without_the_index(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("tar") / "a-000000.tar"
    samples = {key: data.draw(MEMBERS) for key in data.draw(KEYS)}
    write(path, samples)
    with_index = Shard(path)
    index_path(path).unlink()
    scanned = Shard(path)
    assert read(with_index) == read(scanned) == samples
    assert with_index.keys == list(samples)
    assert read(Shard(path)) == samples  # through the index that scanning wrote


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_tarfile_and_webdataset_read_our_shards(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("tar") / "a-000000.tar"
    samples = {key: data.draw(MEMBERS) for key in data.draw(KEYS)}
    write(path, samples)
    with tarfile.open(path) as archive:
        contents = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    assert contents == {f"{key}.{e}": content for key, members in samples.items() for e, content in members.items()}
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == list(samples)
    assert [{e: v for e, v in sample.items() if not e.startswith("__")} for sample in theirs] == list(samples.values())


def test_we_read_what_webdataset_writes(tmp_path: Path) -> None:
    path = tmp_path / "w.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for n in range(3):
            writer.write({"__key__": f"folder/{'q' * 140}{n}", "txt": f"text {n}"})  # long names need pax headers
    shard = Shard(path)
    assert [key[-1] for key in shard.keys] == ["0", "1", "2"]
    assert bytes(shard.member(2, "txt")) == b"text 2"


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write(tmp_path / name, {"k": {"json": b"{}", "webp": b"123"}})
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_a_shard_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"

    def interrupted() -> None:
        with ShardWriter(path) as writer:
            writer.write("k", {"json": b"{}"})
            assert not path.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_shard_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write(path, {f"k{n}": {"webp": bytes(700), "json": b"{}"} for n in range(3)})
    whole = path.read_bytes()
    for size in (100, 512, 1000, len(whole) // 2, len(whole) - 2 * 512):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="cut off at byte"):
            Shard(path)


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write(path, {"k": {"json": b"{}"}})
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    index_path(path).unlink()
    with pytest.raises(DataError, match="damaged at byte 0"):
        Shard(path)


def test_an_index_of_another_file_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write(path, {"old": {"json": b"{}"}})
    index = index_path(path).read_bytes()
    write(path, {"new": {"json": b"{}"}})
    index_path(path).write_bytes(index)
    assert Shard(path).keys == ["new"]
    index_path(path).write_text(json.dumps({"format": "other"}))
    assert Shard(path).keys == ["new"]


def test_the_index_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write(path, {"k": {"json": b"{}"}})
    index_path(path).write_bytes(bytes(16))
    assert Shard(path).keys == ["k"]
    assert index_path(path).read_bytes() == bytes(16)


def test_an_empty_file_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty \(0 bytes\)"):
        Shard(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"cannot read .*b\.tar"):
        Shard(tmp_path / "b.tar")


@pytest.mark.parametrize("name", ["../out.json", "/etc/out.json", "a/../../out.json"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(DataError, match="points outside the archive"):
        Shard(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("k.json")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(DataError, match="link or a device"):
        Shard(tmp_path / "a.tar")


@pytest.mark.parametrize("names", [["k.json", "k.json"], ["k.json", "l.json", "k.webp"]])
def test_duplicates_are_refused_on_reading(tmp_path: Path, names: list[str]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(DataError, match="occurs twice"):
        Shard(tmp_path / "a.tar")


def test_duplicate_and_unusable_keys_are_refused_on_writing(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.tar")
    writer.write("k", {"json": b"{}"})
    with pytest.raises(DataError, match="written twice"):
        writer.write("k", {"json": b"{}"})
    for key in ("", "a.b", "../a", "a/b", "__a"):
        with pytest.raises(DataError, match="cannot name a sample"):
            writer.write(key, {"json": b"{}"})
    writer.abort()


def test_a_missing_member_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", {"k": {"json": b"{}"}, "l": {"webp": b""}})
    with pytest.raises(DataError, match=r"'k' has no \.webp member"):
        Shard(tmp_path / "a.tar").member(0, "webp")


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path / "a.tar")
    writer.write("k", {"json": b"{}"})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PreflightError, match="the disk is full"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PreflightError, match="cannot write"):
        ShardWriter(tmp_path / "file" / "a.tar")


@pytest.mark.parametrize("content", [b"no archive" * 100, b"\x89PNG" + bytes(range(256)) * 9, b"\x1f\x8b" + b"7" * 999])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tar is (damaged|cut off)"):
        Shard(tmp_path / "a.tar")
