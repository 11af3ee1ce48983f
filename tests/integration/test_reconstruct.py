"""`unicom sample --reconstruct FOLDER`: names, seeds, resuming, bad files, tars, workers. About 30 s; one Ray."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import reconstruct
from pipelines.picture_list import SHEET, list_pictures
from pipelines.reconstruct import LEDGER, Settings, seed_of
from unicom_dist.cli.main import run as unicom
from unicom_dist.config.errors import CheckpointError, ConfigError, DataError, PreflightError
from unicom_dist.config.schema import Config
from unicom_dist.data.tar import ShardWriter
from unicom_dist.sample.pipeline import UniComPipeline
from unicom_dist.testing.awkward import awkward_pictures, encoded
from unicom_dist.testing.tiny import COLOURS, draw_shape, tiny_config, write_tiny_assets
from unicom_dist.testing.tiny_run import write_tiny_weights

QUICK = Settings(decoder_steps=1)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A model with a codec alone, whose pictures have their own shapes."""
    folder = tmp_path_factory.mktemp("model")
    write_tiny_assets(folder)
    stages = [{"name": "codec", "kind": "codec", "steps": 1, "batch": 8}]
    config = tiny_config(folder, codec={"decoder": {"buckets": "aspect"}}, encoder={"crop": "bucket"}, stages=stages)
    write_tiny_weights(config)
    return config


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five pictures in two folders, one of them 2:1."""
    folder = tmp_path / "pictures"
    (folder / "deep" / "er").mkdir(parents=True)
    for number, name in enumerate(("b.png", "a.jpg", "deep/c.webp", "deep/er/d.e.png", "wide.bmp")):
        colour = list(COLOURS.values())[number]
        draw_shape("circle", colour).resize((64, 32) if name == "wide.bmp" else (32, 32)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def made(out: Path) -> dict[str, bytes]:
    found = (path for path in out.rglob("*") if path.is_file() and path.name not in (LEDGER, SHEET))
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in found}


def test_every_picture_keeps_its_name_and_its_shape(config: Config, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = reconstruct.run(config.run_dir, pictures, out, QUICK, batch=2)
    assert (summary.made, summary.existing, summary.skipped) == (5, 0, {})
    assert set(made(out)) == {"b.png", "a.png", "deep/c.png", "deep/er/d.e.png", "wide.png"}
    assert Image.open(out / "b.png").size == (16, 16)
    wide = Image.open(out / "wide.png")
    assert wide.size == (24, 12)
    assert wide.info["source"] == "wide.bmp"
    seed = seed_of(0, "wide.bmp")
    assert wide.info["seed"] == str(seed)
    pipeline = UniComPipeline.from_pretrained(config.run_dir)
    (alone,) = pipeline.reconstruct([Image.open(pictures / "wide.bmp")], [seed], 1)
    assert np.abs(np.asarray(alone, int) - np.asarray(wide.convert("RGB"), int)).max() <= 1
    assert Image.open(out / SHEET).size[0] > 100


def test_what_exists_is_not_made_again_and_what_is_lost_is(config: Config, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reconstruct.run(config.run_dir, pictures, out, QUICK)
    before = made(out)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.png") if path.name not in ("a.png", SHEET)}
    (out / "a.png").unlink()
    summary = reconstruct.run(config.run_dir, pictures, out, QUICK)
    assert (summary.made, summary.existing) == (1, 4)
    assert made(out) == before
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert reconstruct.run(config.run_dir, pictures, out, QUICK).made == 0
    assert (out / SHEET).is_file()


def test_an_interrupted_job_goes_on(
    config: Config, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    reconstruct.run(config.run_dir, pictures, whole, QUICK)
    write, written = reconstruct.replace_file, []

    def interrupted(path: Path, content: bytes) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(reconstruct, "replace_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reconstruct.run(config.run_dir, pictures, out, QUICK, batch=1)
    assert len(made(out)) == 3
    summary = reconstruct.run(config.run_dir, pictures, out, QUICK)
    assert (summary.made, summary.existing) == (2, 3)
    assert set(made(out)) == set(made(whole))
    for name in made(whole):
        difference = np.asarray(Image.open(out / name), int) - np.asarray(Image.open(whole / name), int)
        assert np.abs(difference).max() <= 1  # another batch: rounding


def test_another_model_or_other_settings_are_refused(config: Config, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reconstruct.run(config.run_dir, pictures, out, QUICK)
    with pytest.raises(DataError, match="another model or other settings") as caught:
        reconstruct.run(config.run_dir, pictures, out, Settings(seed=1, decoder_steps=1))
    assert caught.value.why == "seed was 0, now 1"
    other = tmp_path / "other"
    shutil.copytree(config.run_dir, other)
    write_tiny_weights(config.model_copy(update={"run_dir": str(other), "seed": 5}))
    with pytest.raises(DataError, match="another model") as caught:
        reconstruct.run(other, pictures, out, QUICK)
    assert caught.value.why.startswith("model was")
    with pytest.raises(CheckpointError, match="holds no model"):
        reconstruct.run(tmp_path, pictures, tmp_path / "new", QUICK)


def test_every_kind_of_picture_is_reconstructed_or_named(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = tmp_path / "awkward", tmp_path / "out"
    folder.mkdir()
    refused = {}
    for name, picture in awkward_pictures().items():
        (folder / f"{name}.png").write_bytes(picture.content)
        if picture.refusal or name == "very-wide":
            refused[f"{name}.png"] = picture.refusal or "20000 x 10 pixels"
    (folder / "cut.tar").write_bytes(b"no archive" * 100)
    (folder / "folder.png").mkdir()
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    summary = reconstruct.run(config.run_dir, folder, out, QUICK)
    assert set(summary.skipped) == {*refused, "cut.tar"}
    for name, reason in refused.items():
        assert reason in summary.skipped[name]
        assert any(name in message and reason in message for message in caplog.messages)
    assert set(made(out)) == {f"{name}.png" for name in awkward_pictures()} - set(refused)
    entry = json.loads((out / LEDGER).read_text().splitlines()[0])
    assert set(entry["skipped"]) == set(refused)
    only = tmp_path / "only"
    only.mkdir()
    (only / "bad.png").write_bytes(b"")
    with pytest.raises(DataError, match="none of 1 pictures can be read") as caught:
        reconstruct.run(config.run_dir, only, tmp_path / "none", QUICK)
    assert "bad.png" in caught.value.why


def test_tars_and_single_pictures_are_listed_like_folders(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    red = encoded(draw_shape("circle", COLOURS["red"]))
    with ShardWriter(pictures / "deep" / "some.tar") as writer:
        writer.write("one", {"png": red, "json": b"{}"})
        writer.write("two", {"txt": b"no picture"})
    found, broken = list_pictures(pictures / "deep" / "some.tar", out)
    assert not broken
    assert [picture.name for picture in found] == ["some/one.png"]
    assert found[0].target == str(out / "some" / "one.png")
    assert found[0].read().size == (32, 32)
    names = [picture.name for picture in list_pictures(pictures, out)[0]]
    assert names == ["a.jpg", "b.png", "deep/c.webp", "deep/er/d.e.png", "deep/some/one.png", "wide.bmp"]
    assert [picture.name for picture in list_pictures(pictures / "b.png", out)[0]] == ["b.png"]
    assert [picture.name for picture in list_pictures(pictures, out, limit=2)[0]] == ["a.jpg", "b.png"]


def test_no_two_pictures_share_an_output(pictures: Path, tmp_path: Path) -> None:
    (pictures / "a.png").write_bytes((pictures / "b.png").read_bytes())
    (pictures / SHEET).write_bytes((pictures / "b.png").read_bytes())
    targets = {p.name: Path(p.target).relative_to(tmp_path).as_posix() for p in list_pictures(pictures, tmp_path)[0]}
    assert targets["a.jpg"] == "a.jpg.png"
    assert targets["a.png"] == "a.png.png"
    assert targets["b.png"] == "b.png"
    assert targets[SHEET] == f"{SHEET}.png"
    (pictures / "a.jpg.webp").write_bytes((pictures / "b.png").read_bytes())
    again = [picture.target for picture in list_pictures(pictures, tmp_path)[0]]
    assert len(set(again)) == len(again)


def test_outputs_are_not_read_as_inputs(pictures: Path, tmp_path: Path) -> None:
    inside = pictures / "out"
    inside.mkdir()
    (inside / "b.png").write_bytes((pictures / "b.png").read_bytes())
    assert len(list_pictures(pictures, inside)[0]) == 5
    with pytest.raises(ConfigError, match="--out"):
        list_pictures(pictures, pictures)
    for nothing in (tmp_path / "none", pictures / "notes.txt"):
        with pytest.raises(DataError, match="--reconstruct"):
            list_pictures(nothing, inside)


def test_a_second_job_on_the_same_folder_is_refused(config: Config, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with reconstruct.Ledger(out / LEDGER), pytest.raises(PreflightError, match="another job"):
        reconstruct.run(config.run_dir, pictures, out, QUICK)


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_the_command_draws_the_same_on_any_number_of_workers(
    config: Config, pictures: Path, tmp_path: Path, workers: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--reconstruct", str(pictures), "--out", str(out), "--workers", workers, "--batch", "1", "--seed", "3"]
    assert unicom(["sample", config.run_dir, *options]) == 0
    assert "5 pictures reconstructed" in capsys.readouterr().out
    here = tmp_path / "here"
    settings = Settings(3, config.sample.decoder_steps, config.sample.solver)
    reconstruct.run(config.run_dir, pictures, here, settings, batch=1)
    assert made(out) == made(here)
