"""`unicom generate`: names, seeds, bad rows, resuming after kills, tars, workers. About 30 s; Ray in two tests."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import generate
from pipelines.generate import INDEX, LEDGER, Settings
from pipelines.prompts import name_of, read_prompts
from unicom_dist.cli.main import run as unicom
from unicom_dist.config.errors import CheckpointError, ConfigError, DataError
from unicom_dist.config.schema import Config
from unicom_dist.data.tar import Shard
from unicom_dist.data.text import Vocabulary
from unicom_dist.sample.pipeline import UniComPipeline
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets
from unicom_dist.testing.tiny_run import write_tiny_weights

QUICK = Settings(steps=1, decoder_steps=1)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_assets(folder)
    config = tiny_config(folder)
    write_tiny_weights(config)
    Vocabulary.full(config.prior.tokenizer).save(Path(config.run_dir) / "vocabulary.json")
    return config


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\na blue square\na green triangle\n")
    return path


def made(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != LEDGER}


def distance(a: Path, b: Path) -> int:
    return int(np.abs(np.asarray(Image.open(a), int) - np.asarray(Image.open(b), int)).max())


def test_every_prompt_and_number_has_a_picture_with_its_facts(config: Config, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = Settings(images_per_prompt=2, steps=1, decoder_steps=1)
    summary = generate.run(config.run_dir, prompts, out, settings, batch=4, workers=1)
    assert (summary.made, summary.existing, summary.skipped) == (6, 0, {})
    names = [f"{line:06d}-{number:03d}" for line in (1, 3, 4) for number in (0, 1)]
    assert set(made(out)) == {*(f"{name}.png" for name in names), INDEX}
    rows = [json.loads(line) for line in (out / INDEX).read_text().splitlines()]
    assert [row["key"] for row in rows] == names
    assert len({row["seed"] for row in rows}) == 6
    picture = Image.open(out / rows[2]["file"])
    assert (picture.info["prompt"], picture.info["seed"]) == ("a blue square", str(rows[2]["seed"]))
    assert picture.info["model"] == generate.model_fingerprint(config.run_dir)
    (alone,) = UniComPipeline.from_pretrained(config.run_dir)("a blue square", rows[2]["seed"], 1, decoder_steps=1)
    assert np.abs(np.asarray(alone, int) - np.asarray(picture.convert("RGB"), int)).max() <= 1


def test_rows_of_any_file_are_drawn_or_named(config: Config, tmp_path: Path) -> None:
    rows = [
        {"id": "cat/1", "prompt": "a cat", "seed": 7},
        {"prompt": " "},
        {"prompt": "a dog", "negative": "blurred"},
        {"id": "cat/1", "prompt": "again"},
        {"prompt": "x", "seed": -1},
        "text",
        {"id": "long", "prompt": "red " * 1100},
        {"id": "plain", "prompt": "a hat"},
    ]
    path, out = tmp_path / "p.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{cut\n")
    summary = generate.run(config.run_dir, path, out, Settings(2, steps=1, decoder_steps=1), workers=1)
    cat = name_of("cat/1")
    assert set(made(out)) == {f"{name}-00{n}.png" for name in (cat, "plain") for n in (0, 1)} | {INDEX}
    assert set(summary.skipped) == {*(f"row {n}" for n in (2, 3, 4, 5, 6, 9)), "long-000", "long-001"}
    assert "negative" in summary.skipped["row 3"]
    assert "at most 1024" in summary.skipped["long-000"]
    seeds = {row["key"]: row["seed"] for row in map(json.loads, (out / INDEX).read_text().splitlines())}
    assert (seeds[f"{cat}-000"], seeds[f"{cat}-001"]) == (7, 8)
    again = generate.run(config.run_dir, path, out, Settings(2, steps=1, decoder_steps=1), workers=1)
    assert (again.made, again.existing, again.skipped) == (0, 4, summary.skipped)


def test_tables_are_read_by_column(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    (tmp_path / "a.csv").write_text("id,caption,seed\none,a cat,\ntwo,a dog,3\n")
    parquet.write_table(
        pyarrow.table({"id": ["one", "two"], "caption": ["a cat", "a dog"], "seed": [None, 3]}), tmp_path / "a.parquet"
    )
    a, b = (read_prompts(tmp_path / f"a.{kind}", "caption") for kind in ("csv", "parquet"))
    assert a == b
    assert a.digest == b.digest
    assert [(row.name, row.seed) for row in a.rows] == [("one", None), ("two", 3)]
    with pytest.raises(DataError, match="no column 'prompt'"):
        read_prompts(tmp_path / "a.csv")
    for name, error in (("a.png", ConfigError), ("none.txt", DataError)):
        with pytest.raises(error):
            read_prompts(tmp_path / name)


def test_other_prompts_settings_or_models_are_refused(config: Config, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    generate.run(config.run_dir, prompts, out, QUICK, workers=1)
    before = made(out)
    with pytest.raises(DataError, match="other settings") as caught:
        generate.run(config.run_dir, prompts, out, Settings(steps=2, decoder_steps=1), workers=1)
    assert caught.value.why == "steps: it was 1, now 2"
    prompts.write_text("a red circle\n")
    with pytest.raises(DataError, match="other prompts") as caught:
        generate.run(config.run_dir, prompts, out, QUICK, workers=1)
    assert "it was '3 prompts of digest" in caught.value.why
    assert "now '1 prompts of digest" in caught.value.why
    with pytest.raises(DataError, match="other settings"):
        generate.run(config.run_dir, prompts, out, QUICK, form="tars", workers=1)
    assert made(out) == before
    with pytest.raises(CheckpointError, match="holds no model"):
        generate.run(tmp_path, prompts, tmp_path / "new", QUICK)


def test_tars_hold_the_same_pictures_and_lost_ones_come_back(config: Config, prompts: Path, tmp_path: Path) -> None:
    out, files = tmp_path / "tars", tmp_path / "files"
    options = {"form": "tars", "workers": 1, "shard_samples": 2, "batch": 1}
    generate.run(config.run_dir, prompts, out, QUICK, **options)
    generate.run(config.run_dir, prompts, files, QUICK, workers=1, batch=1)
    first, second = (Shard(out / generate.tar_name(number)) for number in (0, 1))
    assert (first.keys, second.keys) == (["000001-000", "000003-000"], ["000004-000"])
    assert bytes(first.member(1, "png")) == (files / "000003-000.png").read_bytes()
    assert bytes(first.member(1, "txt")) == b"a blue square"
    facts = json.loads(bytes(first.member(1, "json")))
    assert (facts["prompt"], facts["steps"], len(facts["model"])) == ("a blue square", 1, 32)
    before = made(out)
    (out / generate.tar_name(1)).unlink()
    summary = generate.run(config.run_dir, prompts, out, QUICK, **options)
    assert (summary.made, summary.existing) == (1, 2)
    assert made(out) == before


DRIVER = """
import signal, sys
from pathlib import Path
from pipelines import generate
from pipelines.generate import Settings
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell started in the background
model, prompts, out, form, workers = sys.argv[1:]
settings = Settings(steps=3, decoder_steps=3)
generate.run(model, Path(prompts), Path(out), settings, form, 1, int(workers), shard_samples=5)
"""


def killed(config: Config, path: Path, out: Path, form: str, workers: int, kill_at: int, sent: signal.Signals) -> None:
    """A job in a process of its own, ended by a signal when it has made something."""
    arguments = [config.run_dir, str(path), str(out), form, str(workers)]
    process = subprocess.Popen([sys.executable, "-c", DRIVER, *arguments], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len([*out.glob("*.png"), *out.glob("*.tar")]) < kill_at:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(sent)
    assert process.wait(60) != 0


@pytest.mark.parametrize(("form", "kill_at"), [("files", 7), ("tars", 2)])
def test_every_picture_is_there_once_after_kills(config: Config, tmp_path: Path, form: str, kill_at: int) -> None:
    path, out, whole = tmp_path / "p.txt", tmp_path / "out", tmp_path / "whole"
    path.write_text("".join(f"a red circle {number}\n" for number in range(60)))
    sent = signal.SIGKILL if form == "files" else signal.SIGINT
    killed(config, path, out, form, 1, kill_at, sent)
    settings = Settings(steps=3, decoder_steps=3)
    summary = generate.run(config.run_dir, path, out, settings, form, 1, 1, shard_samples=5)
    assert summary.existing >= kill_at
    assert summary.made + summary.existing == 60
    generate.run(config.run_dir, path, whole, settings, form, 1, 1, shard_samples=5)
    assert set(made(out)) == set(made(whole))
    if form == "files":
        assert max(distance(file, whole / file.name) for file in out.glob("*.png")) <= 1
    else:
        keys = [key for tar in sorted(out.glob("*.tar")) for key in Shard(tar).keys]
        assert keys == [f"{number:06d}-000" for number in range(1, 61)]


@pytest.mark.slow
@pytest.mark.timeout(900)  # three starts of an actor, each of which imports torch
def test_a_killed_actor_is_replaced_and_any_number_of_workers_draws_the_same(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out, whole = tmp_path / "p.txt", tmp_path / "out", tmp_path / "whole"
    path.write_text("".join(f"a red circle {number}\n" for number in range(12)))
    monkeypatch.setattr(generate, "AT_ONCE", 3)
    mark = tmp_path / "killed"
    build = generate.build_worker

    def deadly(*arguments: object) -> object:
        worker = build(*arguments)
        process = worker.process

        def dies_once(task: object, count: object) -> object:
            def then_die(done: int) -> None:
                if done and not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                count(done)

            return process(task, then_die)

        worker.process = dies_once
        return worker

    monkeypatch.setattr(generate, "build_worker", deadly)
    summary = generate.run(config.run_dir, path, out, QUICK, batch=1, workers=2)
    assert mark.exists()
    assert (summary.made, summary.existing) == (12, 0)
    monkeypatch.setattr(generate, "build_worker", build)
    generate.run(config.run_dir, path, whole, QUICK, batch=5, workers=1)
    assert set(made(out)) == set(made(whole))
    assert max(distance(file, whole / file.name) for file in out.glob("*.png")) <= 1


def test_the_command_takes_the_recipe_s_settings(
    config: Config, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--out", str(out), "--workers", "1", "--steps", "1"]
    assert unicom(["generate", config.run_dir, str(prompts), *options]) == 0
    assert "3 pictures drawn" in capsys.readouterr().out
    identity = json.loads((out / LEDGER).read_text().splitlines()[0])["identity"]
    assert (identity["steps"], identity["guidance"]) == (1, config.sample.guidance)
