"""Several sets in one mixture: weighed together or one by one, named in what is trained on. 1 process, seconds."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from unicom_dist.config.errors import ConfigError
from unicom_dist.config.schema import Config
from unicom_dist.data.loader import CodecLoader, PriorLoader, build_vocabulary
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.pairs import open_set
from unicom_dist.data.samples import TASKS
from unicom_dist.data.tar import ShardWriter
from unicom_dist.models.codec import LatentStats
from unicom_dist.models.segments import PackedBatch
from unicom_dist.testing.shards import write_set, write_tiny_sets
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets

STATS = LatentStats(torch.zeros(4), torch.ones(4))
SETS = {"photos": "pairs", "books": "text", "talks": "interleaved"}
BY_SET = {
    "text": {"books": 0.25, "train": 0.125},
    "text_to_image": {"train": 0.125, "photos": 0.25},
    "image_to_text": 0.125,
    "interleaved": 0.125,
}
BOOK = "red circle square blue star " * 40


def write_texts(config: Config, name: str, contents: list[dict[str, Any]]) -> None:
    folder = Path(config.data.path) / name
    writer = ShardWriter(folder / f"{name}-000000.tar")
    for number, content in enumerate(contents):
        writer.write(f"{name}-{number:04d}", {"json": json.dumps(content).encode()})
    Manifest(fingerprint=name, shards=[writer.close()]).write(folder)


def configured(folder: Path, mixture: dict[str, Any], **stage: Any) -> Config:
    settings = {
        "mixture": {**dict.fromkeys(TASKS, 0.0), **mixture},
        "row_positions": 96,
        "batch": 8,
        "micro_batches": 1,
        **stage,
    }
    return tiny_config(folder, data={"sets": SETS, "max_bad_fraction": 0.2}, stages={"pretrain": settings})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    write_tiny_assets(folder)
    config = configured(folder, BY_SET)
    write_tiny_sets(config, 10)
    write_set(config, "photos", 15, 12, [(2, 2), (1, 3)], 10)
    texts: list[dict[str, Any]] = [{"document": f"a book of {BOOK[: 20 * n]}"} for n in range(1, 40)]
    write_texts(config, "books", [{"document": [{"type": "image", "image": "train-0000"}]}, *texts])
    said = [{"role": "user", "content": "a star"}, {"role": "assistant", "content": "a red star"}]
    write_texts(config, "talks", [{"messages": said}] * 5)
    return folder


def loader(config: Config) -> PriorLoader:
    return PriorLoader(config, config.stage("pretrain"), build_vocabulary(config), STATS)


def samples(batches: list[PackedBatch]) -> list[tuple[str, str, str]]:
    """(task, set, key) of each."""
    return [found for batch in batches for found in zip(batch.tasks, batch.sources, batch.keys, strict=True)]


def test_sets_with_weights_of_their_own_have_exact_shares(folder: Path) -> None:
    with loader(configured(folder, BY_SET)) as steps:
        drawn = samples([batch for _ in range(12) for batch in steps.next_step()])
        report = steps.report()
    counts = Counter((task, name) for task, name, _ in drawn)
    weights: dict[tuple[str, str], float] = {}
    for task, weight in BY_SET.items():
        if isinstance(weight, dict):
            weights |= {(task, name): each for name, each in weight.items()}
    for stream, weight in weights.items():
        assert counts[stream] == pytest.approx(weight * len(drawn), abs=9), "up to eight rows are open"
    assert {name for task, name, _ in drawn if task == "image_to_text"} == {"train", "photos"}
    assert all(key.startswith(name) for _, name, key in drawn)
    named = {name.removeprefix("data/epochs/") for name in report if "epochs" in name}
    assert named == {*(f"{task}/{name}" for task, name in weights), "image_to_text", "interleaved"}


def test_the_sets_of_a_task_with_one_weight_are_gone_through_as_one(folder: Path) -> None:
    with loader(configured(folder, {"image_to_text": 1.0}, batch=1)) as steps:
        drawn = [found for _ in range(40) for found in samples(steps.next_step())]
    counts = Counter(key for _, _, key in drawn)
    assert len(counts) == 25, "ten of train, fifteen of photos"
    assert max(counts.values()) - min(counts.values()) <= 2, "each once an epoch, but for open rows"


def test_a_stream_goes_on_where_it_stood(folder: Path) -> None:
    config = configured(folder, BY_SET, steps=9, mixture_changes={2: {"text": {"books": 1.0}}, 4: BY_SET})
    with loader(config) as first, loader(config) as second:
        for _ in range(3):
            first.next_step()
        state = json.loads(json.dumps(first.state_dict()))
        second.load_state_dict(state)
        for _ in range(4):
            assert samples(second.next_step()) == samples(first.next_step())


def test_text_longer_than_a_row_is_cut_to_it(folder: Path) -> None:
    config = configured(folder, {"text": {"books": 1.0}})
    vocabulary = build_vocabulary(config)
    with PriorLoader(config, config.stage("pretrain"), vocabulary, STATS) as steps:
        batches = [batch for _ in range(6) for batch in steps.next_step()]
        report = steps.report()
    lengths = []
    for batch in batches:
        for n, segments in itertools.groupby(batch.segments, key=lambda segment: segment.sample):
            lengths.append(sum(segment.length for segment in segments))
            assert int((batch.label_sample == n).sum()) == lengths[-1] - 1, "all but the first token are learned"
        following = {int(i): int(token) for i, token in zip(batch.token_index, batch.token_ids, strict=True)}
        assert [following[int(i) + 1] for i in batch.label_index] == batch.label_ids.tolist()
    assert min(lengths) < max(lengths) == 96
    assert report["data/bad_samples"] == 1, "the text that shows an image"


def test_the_codec_is_trained_on_all_sets_of_pairs(folder: Path) -> None:
    config = configured(folder, BY_SET)
    with CodecLoader(config, config.stage("codec")) as steps:
        keys = {key for _ in range(20) for batch in steps.next_step() for key in batch.keys}
    assert keys == {*open_set(config, "train").keys(), *open_set(config, "photos").keys()}


@pytest.mark.parametrize(
    ("mixture", "what", "remedy"),
    [
        ({"text_to_image": {"photo": 1.0}}, "mixture with text_to_image: photo", "one of train, photos"),
        ({"text_to_image": {"books": 1.0}}, "mixture with text_to_image: books", "one of train, photos"),
        ({"image_text_to_image": 1.0}, "mixture with image_text_to_image", "{SET: image_text_to_image}"),
        ({"text": {"books": -1.0}}, "is no weight", "{train: 0.4, photos: 0.1}"),
        ({"text": "much"}, "'much' is no weight", "for example 0.5"),
        ({"text": {"books": 0.0}}, "all weights are 0", "positive weight"),
    ],
)
def test_weights_that_cannot_be_are_refused(tmp_path: Path, mixture: dict[str, Any], what: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(tmp_path, mixture)
    assert what in caught.value.what
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("name", ["train", "heldout", "photos-heldout", "../photos"])
def test_names_that_are_taken_or_no_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"sets\."):
        tiny_config(tmp_path, data={"sets": {name: "pairs"}})
