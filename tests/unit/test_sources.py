"""What each source lists, and what it leaves out. One process."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from fetched import fetched
from PIL import Image

from pipelines.sources import Record, key_of, open_source
from unicom_dist.config.errors import ConfigError, DataError
from unicom_dist.config.schema import DataConfig
from unicom_dist.data.tar import ShardWriter


def png(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "png")
    return buffer.getvalue()


def source(where: object, **settings: object) -> DataConfig:
    return DataConfig(source=str(where), **settings)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pics"
    (root / "sub").mkdir(parents=True)
    for name, caption in {
        "a.png": "a cat\n a  small cat ",
        "sub/b.v2.jpg": "a dog",
        "c.webp": " \n",
        "d.png": None,
    }.items():
        (root / name).write_bytes(png())
        if caption is not None:
            (root / name).with_suffix(".txt").write_text(caption)
    (root / "a.jpg").write_bytes(png())
    (root / "notes.md").write_text("no picture")
    return root


def test_a_folder_lists_pictures_with_captions_and_counts_the_rest(folder: Path) -> None:
    found = open_source(source(folder))
    assert [(record.key, record.captions) for record in found.records] == [
        ("a", ("a cat", "a small cat")),
        ("sub_b_v2", ("a dog",)),
    ]
    assert found.skipped == {"a": "the key occurs twice; the first was kept", "c": "no caption", "d": "no caption"}
    assert found.records[0].read() == png()


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_tables_of_every_kind_list_the_same(folder: Path, suffix: str) -> None:
    rows = [("a.png", "a cat"), ("sub/b.v2.jpg", "a dog"), ("a.png", "a kitten"), ("c.webp", "")]
    path = folder / f"table{suffix}"
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"path": [row[0] for row in rows], "caption": [row[1] for row in rows]}), path)
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"path": image, "caption": text}) for image, text in rows))
    else:
        mark = "," if suffix == ".csv" else "\t"
        path.write_text("\n".join(mark.join(row) for row in [("path", "caption"), *rows]))
    found = open_source(source(path))
    assert {record.key: record.captions for record in found.records} == {
        "a": ("a cat", "a kitten"),
        "sub_b_v2": ("a dog",),
    }
    assert list(found.skipped) == ["c"]


def test_a_table_without_the_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("url,label\nx,y\n")
    with pytest.raises(DataError, match="columns url, label"):
        open_source(source(tmp_path / "t.csv"))
    (tmp_path / "t.jsonl").write_text('{"path": ')
    with pytest.raises(DataError, match="cannot be read"):
        open_source(source(tmp_path / "t.jsonl"))


def test_tars_list_captions_from_json_and_txt(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x-0.tar") as writer:
        writer.write("one", {"png": png("blue"), "json": json.dumps({"caption": "b", "captions": ["sea"]}).encode()})
        writer.write("two", {"jpg": png(), "txt": b"red"})
        writer.write("three", {"txt": b"no picture"})
    with ShardWriter(tmp_path / "x-1.tar") as writer:
        writer.write("one", {"png": png(), "txt": b"again"})
        writer.write("four", {"png": png(), "json": b"not json"})
    found = open_source(source(tmp_path / "x-*.tar"))
    assert {record.key: record.captions for record in found.records} == {"one": ("b", "sea"), "two": ("red",)}
    assert set(found.skipped) == {"one", "three", "four"}
    assert found.records[0].read() == png("blue")


def test_a_truncated_tar_is_named(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x.tar") as writer:
        writer.write("one", {"png": png(), "txt": b"red"})
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:700])
    with pytest.raises(DataError, match=r"x\.tar"):
        open_source(source(tmp_path / "x.tar"))


def test_missing_and_empty_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not there"):
        open_source(source(tmp_path / "nothing"))
    with pytest.raises(DataError, match="no usable image-text pair"):
        open_source(source(tmp_path))


def test_the_listing_has_an_identity(folder: Path) -> None:
    before = open_source(source(folder)).fingerprint
    assert open_source(source(folder)).fingerprint == before
    (folder / "a.txt").write_text("a tiger")
    assert open_source(source(folder)).fingerprint != before


def test_a_limit_takes_the_same_records_whatever_else_there_is(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"p{number}.png").write_bytes(png())
        (tmp_path / f"p{number}.txt").write_text("x")
    few = {record.key for record in open_source(source(tmp_path, limit=4)).records}
    more = {record.key for record in open_source(source(tmp_path, limit=8)).records}
    assert len(few) == 4
    assert few < more
    assert few != {f"p{number}" for number in (0, 1, 10, 11)}  # not simply the first ones


def test_keys_are_safe_and_distinct() -> None:
    assert key_of("a/b.c d") == "a_b_c_d"
    names = ["x" * 200 + "1", "x" * 200 + "2", "猫", "犬", "__dunder__"]
    keys = [key_of(name) for name in names]
    assert len(set(keys)) == len(names)
    for key in keys:
        assert len(key) <= 72
        assert key.isascii()
        assert not key.startswith("__")
        assert not set(key) & set("./\\")


def test_sided_captions_are_not_mirrored() -> None:
    assert Record("k", ("red apple",), "s").may_mirror
    assert not Record("k", ("left arrow",), "s").may_mirror
    assert not Record("k", ("three o’clock",), "s").may_mirror
    assert Record("k", ("leftover cake",), "s").may_mirror


def emoji_archives(folder: Path, names: dict[str, str]) -> None:
    folder.mkdir(parents=True)

    def write(path: Path, members: dict[str, bytes]) -> None:
        with tarfile.open(path, "w:gz") as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    write(folder / "emoji.tgz", {f"package/assets/{name}.webp": png() for name in names})
    for kind, file in (("annotations", "annotations"), ("annotationsDerived", "annotations-derived")):
        members = {}
        for language in ("en", "de"):
            entries = {
                emoji: {"tts": [f"{text} {language}"], "default": ["word", f"{text} {language}"]}
                for emoji, text in (entry.split("=") for entry in names.values() if entry)
                if (kind == "annotations") == (len(emoji) == 1)
            }
            members[f"package/{kind}/{language}/annotations.json"] = json.dumps(
                {kind: {"annotations": entries}}
            ).encode()
        write(folder / f"{file}.tgz", members)


def test_emoji_have_names_and_keywords_and_no_skin_tones(tmp_path: Path) -> None:
    names = {
        "1f600": "\U0001f600=grin",
        "2764-fe0f": "\u2764=heart",  # CLDR names it without the variation selector
        "1f44b-1f3fb": "\U0001f44b\U0001f3fb=light wave",
        "1f9d1-200d-1f33e": "\U0001f9d1\u200d\U0001f33e=farmer",
        "1faff": "",
    }
    emoji_archives(tmp_path / "fluent-emoji", names)
    found = open_source(DataConfig(languages=["en", "de"]), tmp_path)
    captions = {record.key: record.captions for record in found.records}
    assert set(captions) == {"1f600", "2764-fe0f", "1f9d1-200d-1f33e"}
    assert captions["1f600"] == ("grin en", "grin de", "word")
    with pytest.raises(ConfigError, match="xx"):
        open_source(DataConfig(languages=["xx"]), tmp_path)
    with pytest.raises(DataError, match="is not there"):
        open_source(DataConfig(), tmp_path / "elsewhere")


@pytest.mark.slow
def test_the_fetched_emoji_are_1868() -> None:
    fetched("fluent-emoji")
    found = open_source(DataConfig())
    assert len(found.records) == 1868
    assert not found.skipped
    assert {record.key: record.captions[0] for record in found.records}["1f680"] == "rocket"
