"""Sets beside train, from their sources to the figures of a run that weighs them one by one. 1 process, about 10 s."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from encoded_sets import write_features
from PIL import Image
from training_run import write_codec, write_stats

from pipelines import ingest, parts
from unicom_dist.config.errors import ConfigError, DataError
from unicom_dist.config.schema import Config
from unicom_dist.data.loader import build_vocabulary
from unicom_dist.data.pairs import conversation_of, image_of
from unicom_dist.data.shardset import ShardSet
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets
from unicom_dist.tracking.metrics import read_metrics
from unicom_dist.train.loop import train_stage
from unicom_dist.train.pipeline import preflight
from unicom_dist.train.signals import StopRequest
from unicom_dist.train.watchdog import Watchdog

SETS = {"photos": "pairs", "books": "text", "talks": "interleaved"}
MIXTURE = {
    "text": {"books": 1, "train": 1},
    "text_to_image": {"train": 1, "photos": 2},
    "image_to_text": 1,
    "interleaved": 1,
}


def write_sources(folder: Path) -> dict[str, Path]:
    """Pictures with captions, a table of texts, a table of conversations about pictures of their own."""
    photos = folder / "sources/photos"
    photos.mkdir(parents=True)
    for number in range(24):
        Image.new("RGB", (40, 30), (10 * number, 0, 200)).save(photos / f"{number:02d}.png")
        (photos / f"{number:02d}.txt").write_text(f"a blue photo {number}")
    said = [{"text": f"text {number} of a red circle"} for number in range(30)]
    shown = {"role": "user", "content": [{"type": "image", "image": ""}, {"type": "text", "text": "Which colour?"}]}
    talk = {"messages": [shown, {"role": "assistant", "content": "blue"}]}
    talks = [{"key": f"talk-{n}", "path": f"photos/{n:02d}.png", **talk} for n in range(20)]
    tables: dict[str, list[dict[str, Any]]] = {"books": said, "talks": talks}
    for name, rows in tables.items():
        (folder / f"sources/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"photos": photos, **{name: folder / f"sources/{name}.jsonl" for name in tables}}


def with_source(config: Config, source: Path, **data: Any) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"source": str(source), **data})})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_tiny_assets(folder, pictures=24)
    return folder


@pytest.fixture(scope="module")
def sources(folder: Path) -> dict[str, Path]:
    return write_sources(folder)


@pytest.fixture(scope="module")
def config(folder: Path, sources: dict[str, Path]) -> Config:
    changes = {"mixture": MIXTURE, "steps": 3, "log_every": 3, "row_positions": 128, "batch": 4, "micro_batches": 1}
    config = tiny_config(folder, data={"sets": SETS, "held_out": 0.25}, stages={"alignment": changes})
    ingest.run(config, workers=1)
    for name, source in sources.items():
        ingest.run(with_source(config, source), workers=1, name=name)
    return config


def test_a_source_becomes_a_set_and_its_held_out_one(config: Config, sources: dict[str, Path]) -> None:
    for name, count in {"photos": 24, "books": 30, "talks": 20}.items():
        both = [ShardSet(Path(config.data.path) / each) for each in (name, f"{name}-heldout")]
        keys = [set(each.keys()) for each in both]
        assert len(keys[0]) + len(keys[1]) == count
        assert keys[1] == {key for key in keys[0] | keys[1] if ingest.is_held_out(key, 0.25)} != set()
        again = ingest.run(with_source(config, sources[name]), workers=1, name=name)
        assert [summary.reused for summary in again] == [True, True]
    books, talks = (ShardSet(Path(config.data.path) / name) for name in ("books", "talks"))
    assert {conversation_of(books[n]).texts[0] for n in range(len(books))} < {
        f"text {n} of a red circle" for n in range(30)
    }
    assert conversation_of(talks[0]).shown() == [("", talks.key(0))]
    assert image_of(talks[0])
    assert {"photos", "photos-heldout", "talks", "talks-heldout"} == set(parts.further_sets(config))


def test_another_source_in_the_place_of_a_set_is_refused(config: Config, folder: Path) -> None:
    other = folder / "other.jsonl"
    other.write_text('{"text": "something else"}\n' * 2)
    with pytest.raises(DataError, match="another source or other settings"):
        ingest.run(with_source(config, other), name="books")


@pytest.mark.parametrize(
    ("name", "rows", "why"),
    [
        ("books", [{"text": "good"}, {"txt": "no"}], "it has none of messages, document, text"),
        ("books", [{"text": "good"}, {"document": [{"type": "image", "image": "x"}]}], "data.sets.books is text"),
        ("talks", [{"text": "good"}, {"messages": [{"role": "user", "content": "?"}]}], "the assistant says nothing"),
        ("talks", [{"text": "good"}, {"text": "a picture", "path": "nowhere.png"}], "the file does not exist"),
        ("talks", [{"text": "good", "key": "one"}, {"text": "again", "key": "one"}], "the key occurs twice"),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, name: str, rows: list[dict[str, Any]], why: str) -> None:
    table = tmp_path / "table.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = with_source(tiny_config(tmp_path, data={"sets": SETS}), table, held_out=0.0)
    with pytest.raises(DataError, match=r"1 of 2 samples .* are unusable") as caught:
        ingest.run(config, name=name)
    assert why in caught.value.why
    (summary, _) = ingest.run(with_source(config, table, max_bad_fraction=0.5), name=name)
    assert (summary.samples, len(summary.skipped)) == (1, 1)


def test_files_of_one_name_in_several_folders_do_not_get_in_each_others_way(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, data={"sets": SETS, "held_out": 0.0})
    long = "k" * 200
    for folder in ("a", "b"):
        (tmp_path / "corpus" / folder).mkdir(parents=True)
        (tmp_path / f"corpus/{folder}/part.txt").write_text(f"of {folder}")
        rows = [{"text": f"row of {folder}"}, {"text": "with a key", "key": f"{folder}/{long}"}]
        (tmp_path / f"corpus/{folder}/part.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for source, name, count in (("corpus", "books", 2), ("corpus/**/*.jsonl", "talks", 4)):
        (summary, _) = ingest.run(with_source(config, tmp_path / source), name=name)
        assert (summary.samples, summary.skipped) == (count, {})
    assert list(ShardSet(Path(config.data.path) / "books").keys()) == ["a_part", "b_part"]


def test_sets_and_sources_that_are_not_there_are_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, data={"sets": SETS})
    with pytest.raises(ConfigError) as caught:
        ingest.run(config, name="photo")
    assert "train, photos, books, talks" in caught.value.why
    with pytest.raises(ConfigError, match="is not there"):
        ingest.run(with_source(config, tmp_path / "no.jsonl"), name="books")


def test_a_set_that_was_not_made_is_found_before_anything_is_trained(config: Config) -> None:
    preflight(config)
    lacking = with_source(config, Path("any"), sets={**SETS, "stories": "interleaved"})
    with pytest.raises(DataError, match=r"data.sets.stories: .* is not there") as caught:
        preflight(lacking)
    assert "unicom data ingest --set stories" in caught.value.remedy


def test_losses_are_on_record_by_set_and_of_what_is_held_out_of_it(config: Config) -> None:
    write_features(config, ["train", "heldout", *parts.further_sets(config)])
    write_codec(config)
    write_stats(config)
    build_vocabulary(config).save(Path(config.run_dir) / "vocabulary.json")
    mesh = Mesh(0, 1, torch.device("cpu"))
    train_stage(config, config.stage("alignment"), mesh, StopRequest(), Watchdog(), None)
    records = [record for record in read_metrics(config.run_dir) if record.stage == "alignment"]
    trained = next(record.values for record in records if record.kind == "train")
    held_out = next(record.values for record in records if record.kind == "eval")
    for term, sets in {"text": ("train", "photos", "books", "talks"), "flow": ("train", "photos")}.items():
        by_set = {name: trained[f"loss_by_set/{term}/{name}"] for name in sets}
        assert min(by_set.values()) <= trained[f"loss/{term}"] <= max(by_set.values())
    assert "loss_by_set/flow/books" not in trained
    assert {name for name in held_out if name.startswith("loss/text")} == {
        "loss/text",
        *(f"loss/text_{name}" for name in SETS),
    }
    by_time = [held_out[f"loss/flow_photos@{t:g}"] for t in config.eval.fixed_t]
    assert held_out["loss/flow_photos"] == pytest.approx(sum(by_time) / len(by_time))
    assert not any("flow_books" in name or "flow_talks" in name for name in held_out)
