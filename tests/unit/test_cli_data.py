"""`unicom data` and `unicom doctor` on tiny pictures. Ingesting starts a small pool of processes; 10 s in all."""

import json
from pathlib import Path

import pytest
from PIL import Image

from unicom_dist.cli import checks, doctor
from unicom_dist.cli.main import run
from unicom_dist.testing.tiny import write_pictures


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder / "pictures", 24)
    options = ["data.image_px=32", "data.held_out=0.25", "data.shard_samples=8"]
    assert run(["data", "ingest", str(folder / "pictures"), *options, "--out", str(folder / "sets")]) == 0
    return folder / "sets"


@pytest.fixture
def recipe(shards, tmp_path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(f"name: small\nrun_dir: {tmp_path / 'run'}\ndata: {{path: {shards}}}\n", encoding="utf-8")
    return str(path)


def test_ingested_folder_needs_no_recipe_and_is_whole(recipe, capsys):
    assert run(["data", "check", recipe, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {item["set"] for item in found} == {"train", "heldout"}
    assert sum(item["samples"] for item in found) == 24
    assert all(item["problems"] == [] for item in found)


def test_damaged_shard_is_named_and_exits_4(recipe, shards, tmp_path, capsys):
    copy = tmp_path / "copy"
    for path in shards.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(shards)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    tar = next((copy / "train").glob("*.tar"))
    content = bytearray(tar.read_bytes())
    content[600] ^= 0xFF
    tar.write_bytes(content)
    assert run(["data", "check", recipe, f"data.path={copy}"]) == 4
    shown = capsys.readouterr()
    assert tar.name in shown.err
    assert "Traceback" not in shown.err


def test_statistics_count_samples_and_captions(recipe, capsys):
    assert run(["data", "stats", recipe, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert sum(row["samples"] for row in rows) == 24
    assert all(row["mean_words"] == 3.0 for row in rows)


def test_preview_shows_the_pictures(recipe, tmp_path, capsys):
    out = tmp_path / "deep" / "preview.png"
    assert run(["data", "preview", recipe, "--count", "4", "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    colours = Image.open(out).convert("RGB").getcolors(1 << 20)
    assert len(colours) > 4


@pytest.mark.parametrize(
    ("options", "code", "remedy"),
    [
        (["--set", "heldot"], 4, "it has train, heldout"),
        (["--out", "picture"], 2, "for example picture.png"),
        (["--out", "picture.xyz"], 2, "for example picture.xyz.png"),
    ],
)
def test_preview_of_a_set_or_into_a_file_that_cannot_be_is_refused(options, code, remedy, recipe, capsys):
    assert run(["data", "preview", recipe, *options]) == code
    assert f"  fix:  {remedy}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["data", "check"], ["data", "stats"], ["data", "preview"], ["features", "status"], ["features", "run"]]
)
def test_missing_sets_say_which_command_makes_them(command, recipe, tmp_path, capsys):
    assert run([*command, recipe, f"data.path={tmp_path / 'nowhere'}", "encoder.kind=random"]) == 4
    assert "unicom data ingest" in capsys.readouterr().err


def test_missing_source_is_refused_with_what_a_source_may_be(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("")
    for name, what in (("none", "is not there"), ("notes.txt", "is no source")):
        assert run(["data", "ingest", str(tmp_path / name), "--out", str(tmp_path / "sets")]) == 2
        assert f"{name}' {what}\n  why:  a source is `fluent-emoji`, a folder" in capsys.readouterr().err


def test_a_source_without_a_place_for_its_sets_is_told_to_name_one(tmp_path, capsys):
    assert run(["data", "ingest", str(tmp_path)]) == 2
    assert "add --out" in capsys.readouterr().err


def test_missing_features_say_which_command_makes_them(recipe, capsys):
    assert run(["features", "verify", recipe, "encoder.kind=random"]) == 4
    assert "run `unicom features run`" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["sample"], ["sample", "red apple"], ["eval"], ["chat"]])
@pytest.mark.parametrize("name", ["none", "empty"])
def test_a_folder_without_a_model_is_told_what_to_name(command, name, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    folder = tmp_path / name
    assert run([command[0], str(folder), *command[1:]]) == 5
    assert f"{folder} holds no model\n" in capsys.readouterr().err


def test_sample_inputs_are_checked_before_anything_heavy(tmp_path, capsys):
    assert run(["sample", str(tmp_path), "--image", str(tmp_path / "none.png")]) == 4
    assert "none.png" in capsys.readouterr().err
    assert run(["sample", str(tmp_path), "--reconstruct", str(tmp_path)]) == 4
    assert "no image" in capsys.readouterr().err
    (tmp_path / "model_index.json").write_text("{}")
    assert run(["sample", str(tmp_path)]) == 2
    assert "unicom sample" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "wanted", "good"),
    [
        ("2.13.0+cpu", ">=2.11,<2.14", True),
        ("2.14.0", ">=2.11,<2.14", False),
        ("2.9.1", ">=2.11,<2.14", False),
        ("1.0", "", True),
    ],
)
def test_versions_are_compared_as_pip_does(version, wanted, good):
    assert checks.satisfies(version, wanted) is good


def test_doctor_exits_3_when_something_needed_is_missing(monkeypatch, capsys):
    found = [checks.Check("python", "good", "3.11"), checks.Check("ray", "missing", "not installed", "pip install ray")]
    monkeypatch.setattr(doctor, "all_checks", lambda: found)
    assert run(["doctor"]) == 3
    shown = capsys.readouterr()
    assert "-> pip install ray" in shown.out
    assert shown.err.startswith("missing: ray")
    monkeypatch.setattr(doctor, "all_checks", lambda: found[:1])
    assert run(["doctor"]) == 0


def test_doctor_finds_every_declared_package_here():
    states = {check.name: check.state for check in checks.all_checks()}
    assert states["python"] == "good"
    for package in ("torch", "deepspeed", "ray", "mlflow", "typer"):
        assert states[package] == "good"
