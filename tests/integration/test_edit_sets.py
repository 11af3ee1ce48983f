"""Edits from ingest to the prior's batches: which pictures they use, where they lie, what is read of them."""

import json
from pathlib import Path

import pytest
import torch
from encoded_sets import write_features

from pipelines import edit_sets, ingest, parts
from unicom_dist.config.errors import DataError
from unicom_dist.config.schema import Config
from unicom_dist.data import overview
from unicom_dist.data.loader import (
    PriorLoader,
    build_vocabulary,
    heldout_conversation_batches,
    heldout_sets,
)
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.pairs import conversation_of, open_set
from unicom_dist.data.shardset import ShardSet
from unicom_dist.data.tar import ShardWriter
from unicom_dist.models.codec import LatentStats
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets

SETS = ("train", "heldout", "edits", "edits-heldout")
ONLY_EDITS = {"text": 0, "text_to_image": 0, "image_to_text": 0, "image_text_to_image": 1}
STATS = LatentStats(torch.zeros(4), torch.ones(4))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("edits")
    write_tiny_assets(folder, pictures=36)
    made = tiny_config(
        folder,
        data={"edits": 24, "sets": {"edits": "image_text_to_image"}},
        stages={"pretrain": {"mixture": ONLY_EDITS, "row_positions": 512, "batch": 2, "micro_batches": 1}},
    )
    ingest.run(made, workers=1)
    return made


@pytest.fixture(scope="module")
def encoded(config: Config) -> Config:
    write_features(config, SETS)
    return config


def test_edits_of_held_out_pictures_are_in_a_set_of_their_own(config: Config) -> None:
    data = Path(config.data.path)
    keys = {name: set(ShardSet(data / name).keys()) for name in SETS}
    for name, base, count in (("edits", "train", 24), ("edits-heldout", "heldout", 4)):
        edits = ShardSet(data / name)
        assert 0 < len(edits) <= count
        kinds = [json.loads(bytes(edits[n].parts[""]["json"]))["edit"] for n in range(len(edits))]
        assert len(set(kinds)) >= 3
        for number in range(len(edits)):
            user, assistant = conversation_of(edits[number]).messages
            shown = {part for part in user.parts if isinstance(part, str)}
            assert shown <= keys[base]
            assert assistant.parts == (edits.key(number),)
            assert len(shown) == (2 if "compose" in edits.key(number) else 1)
    assert not keys["edits"] & keys["edits-heldout"]


def test_edits_are_made_once_and_refused_with_other_settings(config: Config, tmp_path: Path) -> None:
    files = {path: path.read_bytes() for path in (Path(config.data.path) / "edits").iterdir()}
    summaries = {summary.name: summary for summary in ingest.run(config, workers=1)}
    assert summaries["edits"].reused
    assert {path: path.read_bytes() for path in files} == files
    more = config.model_copy(update={"data": config.data.model_copy(update={"edits": 25})})
    with pytest.raises(DataError, match="other settings") as caught:
        ingest.run(more, workers=1)
    assert "edits was 24, now 25" in caught.value.why
    skipped: dict[str, str] = {}
    stored = list(edit_sets.made(ShardSet(Path(config.data.path) / "train"), 24, skipped))
    whole = b"".join(files[path] for path in sorted(files) if path.suffix == ".tar")
    assert all(sample.members["webp"] in whole for sample in stored)


def test_jobs_cover_them_and_leave_sets_without_images_alone(config: Config) -> None:
    assert parts.further_sets(config) == ["edits", "edits-heldout"]
    talks = {"sets": {"edits": "image_text_to_image", "talks": "interleaved"}}
    named = config.model_copy(update={"data": config.data.model_copy(update=talks)})
    folder = Path(config.data.path) / "talks"
    with ShardWriter(folder / "talks-000000.tar") as writer:
        writer.write("one", {"json": json.dumps({"document": [{"type": "text", "text": "a red circle"}]}).encode()})
    Manifest(fingerprint="talks", shards=[writer.entry]).write(folder)
    try:
        assert parts.further_sets(named) == ["edits", "edits-heldout"]
        assert {row.set for row in overview.set_stats(config.data.path)} == {*SETS, "talks"}
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_the_trimmed_vocabulary_spells_instructions_without_bytes(config: Config) -> None:
    trimmed = config.model_copy(update={"prior": config.prior.model_copy(update={"vocabulary": "trimmed"})})
    without = trimmed.model_copy(update={"data": trimmed.data.model_copy(update={"sets": {}})})
    said = conversation_of(ShardSet(Path(config.data.path) / "edits")[0]).texts[0]
    assert len(build_vocabulary(trimmed).encode(said)) <= len(build_vocabulary(without).encode(said))
    assert build_vocabulary(trimmed).size > build_vocabulary(without).size


def test_training_reads_references_and_targets_of_training_pictures_only(encoded: Config) -> None:
    vocabulary, stage = build_vocabulary(encoded), encoded.stage("pretrain")
    with PriorLoader(encoded, stage, vocabulary, STATS) as loader:
        batches = [batch for _ in range(3) for batch in loader.next_step()]
        assert loader.report()["data/bad_samples"] == 0
    own = set(ShardSet(Path(encoded.data.path) / "edits").keys())
    for batch in batches:
        assert set(batch.keys) <= own
        assert set(batch.tasks) == {"image_text_to_image"}
        assert 0 < len(batch.flow_index) < len(batch.latents)  # drawn ones and clean references


def test_held_out_edits_are_batches_at_a_fixed_time(encoded: Config) -> None:
    assert heldout_sets(encoded) == {"edits": "image_text_to_image"}
    vocabulary = build_vocabulary(encoded)
    batches = list(heldout_conversation_batches(encoded, "edits", vocabulary, STATS, 0.3, 64))
    edits = open_set(encoded, "edits-heldout", latents=True)
    assert [key for batch in batches for key in batch.keys] == list(edits.keys())
    for batch in batches:
        drawn = torch.zeros(len(batch.t), dtype=torch.bool)
        drawn[batch.flow_index] = True
        assert (batch.t[drawn] == 0.3).all()
        assert (batch.t[~drawn] == 1).all()
    again = next(heldout_conversation_batches(encoded, "edits", vocabulary, STATS, 0.3, 64))
    assert torch.equal(again.noise, batches[0].noise)


def test_a_preview_shows_references_and_result(config: Config) -> None:
    images, labels = overview.preview(config.data.path, "edits", 2)
    assert len(images) == len(labels) >= 4
    assert sum(bool(label) for label in labels) == 2
