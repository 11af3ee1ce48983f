"""Sources into shard sets: split, views, skips, interrupted and repeated ingests. About 10 s, up to 2 processes."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import ingest, pictures
from pipelines.sources import Record, open_source
from unicom_dist.config.errors import DataError, PreflightError
from unicom_dist.config.schema import Config
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.shardset import ShardSet
from unicom_dist.data.sizes import set_sizes
from unicom_dist.testing.awkward import awkward_pictures, near
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets


@pytest.fixture
def config(tmp_path: Path) -> Config:
    write_tiny_assets(tmp_path, pictures=20)
    return tiny_config(tmp_path, data={"augmented_views": 2})


def image_of(members: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(bytes(members["webp"])))


def changed(config: Config, **data: Any) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_sets_hold_every_picture_once_with_its_captions(config: Config) -> None:
    ingest.run(config, workers=2)
    data = Path(config.data.path)
    train, held, augmented = (ShardSet(data / name) for name in ("train", "heldout", "augmented"))
    train_keys, held_keys = ({part.key(i) for i in range(len(part))} for part in (train, held))
    assert len(train_keys) + len(held_keys) == 20
    assert not train_keys & held_keys
    assert held_keys == {key for key in train_keys | held_keys if ingest.is_held_out(key, 0.25)}
    assert 0 < len(held_keys) < 12
    assert {augmented.key(i) for i in range(len(augmented))} == {f"{key}-v{v}" for key in train_keys for v in (1, 2)}
    for part in (train, held):
        for number in range(len(part)):
            members = part[number].parts[""]
            original = Path(config.data.source) / f"{part.key(number)}.png"
            np.testing.assert_array_equal(np.asarray(image_of(members)), np.asarray(Image.open(original)))
            caption = json.loads(bytes(members["json"]))
            assert caption["caption"] == original.with_suffix(".txt").read_text().strip()
            assert (caption["source"], caption["view"]) == ("pictures", 0)


def test_the_bytes_do_not_depend_on_the_number_of_processes(config: Config, tmp_path: Path) -> None:
    ingest.run(config, workers=2)
    other = changed(config, path=str(tmp_path / "other"))
    ingest.run(other, workers=1)
    assert contents(Path(config.data.path)) == contents(Path(other.data.path))


def test_a_second_ingest_reuses_and_other_settings_are_refused(config: Config) -> None:
    ingest.run(config, workers=1)
    before = {path: path.stat().st_mtime_ns for path in Path(config.data.path).rglob("*.tar")}
    assert all(summary.reused for summary in ingest.run(config, workers=1))
    assert {path: path.stat().st_mtime_ns for path in Path(config.data.path).rglob("*.tar")} == before
    with pytest.raises(DataError, match="other settings") as caught:
        ingest.run(changed(config, image_px=16), workers=1)
    assert "image_px was 32, now 16" in caught.value.why


def test_bad_samples_are_skipped_counted_and_named(config: Config) -> None:
    folder = Path(config.data.source)
    for name, content in {"bad-1": b"", "bad-2": b"\x89PNG\r\n\x1a\nnothing"}.items():
        (folder / f"{name}.png").write_bytes(content)
        (folder / f"{name}.txt").write_text("a caption")
    (folder / "bad-3.png").write_bytes((folder / "circle-red-000.png").read_bytes())
    (folder / "bad-3.txt").write_text("  \n")
    tolerant = changed(config, max_bad_fraction=0.5, augmented_views=0)
    summaries = ingest.run(tolerant, workers=1)
    skipped = {key for summary in summaries for key in summary.skipped}
    assert skipped == {"bad-1", "bad-2", "bad-3"}
    assert sum(summary.samples for summary in summaries) == 20
    named = [Manifest.read(Path(config.data.path) / name).skipped for name in ("train", "heldout")]
    assert "cannot be read" in (named[0] | named[1])["bad-1"]
    assert any("skipped (" in summary.line() for summary in summaries)


def test_rows_of_pictures_that_are_not_there_are_skipped_counted_and_named(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [f"pictures/{path.name},a thing" for path in Path(config.data.source).glob("*.png")]
    (tmp_path / "rows.csv").write_text("\n".join(["path,caption", *rows, "pictures/gone.png,a thing", "no/way.png,a"]))
    table = changed(config, source=str(tmp_path / "rows.csv"), max_bad_fraction=0.5, augmented_views=0)
    with caplog.at_level("INFO", "pipelines"):
        summaries = ingest.run(table, workers=1)
    skipped = {key: reason for summary in summaries for key, reason in summary.skipped.items()}
    assert skipped == {"pictures_gone": "the file does not exist", "no_way": "the file does not exist"}
    assert sum(summary.samples for summary in summaries) == 20
    for key in skipped:
        assert any("skipped (" in line and key in line for line in caplog.messages)


def test_every_kind_of_picture_is_stored_or_named(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, picture in awkward_pictures().items():
        (folder / f"{name}.png").write_bytes(picture.content)
        (folder / f"{name}.txt").write_text("a caption")
    config = tiny_config(tmp_path, data={"max_bad_fraction": 0.9, "held_out": 0.0, "image_px": 32})
    ingest.run(config, workers=1)
    train = Path(config.data.path) / "train"
    skipped = Manifest.read(train).skipped
    assert set(skipped) == {name for name, picture in awkward_pictures().items() if picture.refusal}
    for name, reason in skipped.items():
        assert awkward_pictures()[name].refusal in reason
        assert not reason.startswith(name)
    pairs = ShardSet(train)
    stored = {pairs.key(number): image_of(pairs[number].parts[""]) for number in range(len(pairs))}
    sizes = {pairs.key(number): tuple(size) for number, size in enumerate(set_sizes(pairs).tolist())}
    assert len(list(train.glob("*.tar.sizes"))) == len(pairs.manifest.shards)
    for name, image in stored.items():
        picture = awkward_pictures()[name]
        assert image.size == sizes[name] == ((32, 1) if name == "very-wide" else picture.size)
        assert near(image.convert("RGB").getpixel((0, 0)), picture.colour)
        assert "icc_profile" not in image.info


def test_too_many_bad_samples_stop_the_ingest_and_leave_no_manifest(config: Config) -> None:
    for path in list(Path(config.data.source).glob("circle-*.png")):
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match="max_bad_fraction"):
        ingest.run(config, workers=1)
    assert not list(Path(config.data.path).rglob("manifest.json"))
    assert not list(Path(config.data.path).rglob("*.tmp"))


def test_an_interrupted_ingest_is_finished_by_the_next(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = changed(config, path=str(tmp_path / "whole"))
    ingest.run(whole, workers=1)

    class Interrupted(ingest.ShardWriter):
        def close(self) -> Any:
            if "augmented" in str(self.path) and "000001" in self.path.name:
                raise KeyboardInterrupt
            return super().close()

    with monkeypatch.context() as patch:
        patch.setattr(ingest, "ShardWriter", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            ingest.run(config, workers=1)
    assert not (Path(config.data.path) / "augmented" / "manifest.json").exists()
    ingest.run(config, workers=1)
    there = contents(Path(config.data.path))
    there = {name: content for name, content in there.items() if not name.endswith(".tmp")}
    assert there == contents(Path(whole.data.path))


def test_a_lost_shard_is_made_again(config: Config) -> None:
    ingest.run(config, workers=1)
    before = contents(Path(config.data.path))
    (Path(config.data.path) / "train" / "pictures-000000.tar").unlink()
    ingest.run(config, workers=1)
    assert contents(Path(config.data.path)) == before


def test_no_room_and_no_permission_are_said_beforehand(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ingest.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
        with pytest.raises(PreflightError, match="GB free"):
            ingest.run(config, workers=1)
    Path(config.data.path).parent.joinpath("file").write_text("")
    with pytest.raises(PreflightError, match="cannot write"):
        ingest.run(changed(config, path=str(Path(config.data.path).parent / "file" / "data")), workers=1)


WITH_SMALL_FILES = """
import resource, sys
from unicom_dist.cli.main import run
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # bytes: a manifest has room, a shard has not
sys.exit(run(["data", "ingest", *sys.argv[1:]]))
"""


def test_a_shard_that_cannot_be_written_ends_the_ingest_and_the_next_one_makes_all(
    config: Config, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    command = [sys.executable, "-c", WITH_SMALL_FILES, config.data.source, "--out", str(cut)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 3, done.stderr
    assert f"cannot write {cut / 'train'}" in done.stderr
    assert "`ulimit -f`" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(cut) == {}
    for folder in (cut, Path(config.data.path)):
        ingest.run(changed(config, path=str(folder)), workers=1)
    assert contents(cut) == contents(Path(config.data.path))


def kill_oneself(*_: Any) -> None:
    os.kill(os.getpid(), 9)


def test_a_killed_worker_process_is_a_clear_error(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "_prepare", kill_oneself)
    with pytest.raises(PreflightError, match="worker process of the ingest was killed"):
        ingest.run(config, workers=1)


def record(path: Path, caption: str = "a thing") -> Record:
    return Record("key", (caption,), "test", str(path))


def test_transparent_rotated_and_large_pictures_become_upright_rgb(tmp_path: Path) -> None:
    layered = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    layered.paste((0, 0, 255, 255), (0, 0, 20, 20))
    layered.save(tmp_path / "a.png")
    (stored,) = pictures.make_views(record(tmp_path / "a.png"), range(1), 256, 0)
    pixels = np.asarray(image_of(dict(stored.members)))
    assert pixels.shape == (20, 40, 3)
    assert pixels[10, 30].tolist() == [255, 255, 255]
    assert pixels[10, 10].tolist() == [0, 0, 255]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (400, 200)).save(tmp_path / "b.jpg", exif=exif)
    (stored,) = pictures.make_views(record(tmp_path / "b.jpg"), range(1), 100, 0)
    assert image_of(dict(stored.members)).size == (50, 100)


def test_views_depend_on_seed_key_and_number_only(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (64, 64))
    picture.paste((200, 30, 30, 255), (8, 16, 40, 48))
    picture.save(tmp_path / "a.png")
    one = record(tmp_path / "a.png")

    def view(number: int, seed: int = 0) -> bytes:
        return pictures.make_views(one, range(number, number + 1), 64, seed)[0].members["webp"]

    assert view(3) == pictures.make_views(one, range(1, 5), 64, 0)[2].members["webp"]
    assert len({view(1), view(2), view(3), view(1, seed=1)}) == 4


def test_one_sided_captions_are_never_mirrored(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (64, 64))
    picture.paste((0, 0, 0, 255), (4, 24, 24, 40))  # something on the left
    picture.save(tmp_path / "a.png")

    def sides(caption: str) -> set[bool]:
        found = set()
        for view in range(1, 25):
            image = pictures.augment(
                pictures.read_picture(record(tmp_path / "a.png", caption)), record(tmp_path / "a.png", caption), view, 0
            )
            pixels = np.asarray(image).astype(int)
            drawn = np.abs(pixels - pixels[0, -1]).sum(-1) > 60
            if drawn.any():
                found.add(bool(np.argwhere(drawn)[:, 1].mean() < 32))
        return found

    assert sides("leftmost thing") == {True, False}
    assert sides("pointing left") == {True}


def test_listing_and_split_agree_for_tars_made_by_this_project(config: Config, tmp_path: Path) -> None:
    ingest.run(changed(config, held_out=0.0, augmented_views=0), workers=1)
    pattern = str(Path(config.data.path) / "train" / "*.tar")
    again = changed(config, source=pattern, path=str(tmp_path / "again"), augmented_views=0)
    assert len(open_source(again.data).records) == 20
    ingest.run(again, workers=1)
    assert len(ShardSet(tmp_path / "again" / "train")) + len(ShardSet(tmp_path / "again" / "heldout")) == 20


def test_an_empty_tar_among_others_ends_the_ingest_and_leaves_no_set(config: Config, tmp_path: Path) -> None:
    ingest.run(changed(config, held_out=0.0, augmented_views=0), workers=1)
    tars = Path(config.data.path) / "train"
    (tars / "pictures-000001.tar").write_bytes(b"")
    again = changed(config, source=str(tars / "*.tar"), path=str(tmp_path / "again"))
    with pytest.raises(DataError, match=r"pictures-000001\.tar is empty \(0 bytes\)"):
        ingest.run(again, workers=1)
    assert not (tmp_path / "again").exists()
