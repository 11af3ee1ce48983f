"""Conversations and documents: what is learned, drawn, referred to and seen. 1 process, 3 s."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unicom_dist.config.errors import ConfigError, DataError
from unicom_dist.config.schema import Config
from unicom_dist.data.conversations import Conversation
from unicom_dist.data.loader import PriorLoader, build_vocabulary
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.pairs import open_set
from unicom_dist.data.samples import Layout, Layouts
from unicom_dist.data.tar import ShardWriter
from unicom_dist.data.text import Vocabulary
from unicom_dist.models.codec import LatentStats
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.objective.terms import prior_counts, prior_terms, total
from unicom_dist.testing.shards import write_tiny_sets
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets, write_tokenizer

GRID = (1, 2)
EDIT = {
    "messages": [
        {"role": "user", "content": [{"type": "image", "image": "a"}, {"type": "text", "text": "a red circle"}]},
        {"role": "assistant", "content": [{"type": "think", "text": "a blue"}, {"type": "image", "image": "b"}]},
    ]
}
TALK = {
    "messages": [
        {"role": "user", "content": [{"type": "image", "image": "a"}, {"type": "text", "text": "a red"}]},
        {"role": "assistant", "content": "a red circle"},
        {"role": "user", "content": "a blue square"},
        {"role": "assistant", "content": [{"type": "image", "image": "b"}, {"type": "text", "text": "a blue"}]},
    ]
}
STORY = {
    "document": [
        {"type": "text", "text": "a red circle"},
        {"type": "image", "image": "a"},
        {"type": "text", "text": "a blue square"},
        {"type": "image", "image": ""},
    ]
}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, ["a red circle", "a blue square"])
    return Layouts(Vocabulary.full(folder))


def laid(layouts: Layouts, content: dict[str, Any], **options: Any) -> tuple[Layout, list[str]]:
    return Conversation.parse(content, "k").layout(layouts, "interleaved", lambda key, read: GRID, **options)


def spelled(layouts: Layouts, layout: Layout) -> str:
    """The text, with a letter per image position: r(ead), R(eference), d(rawn)."""
    names = {row: token for token, row in layouts.vocabulary.control.items()}
    letters = {"read": "r", "reference": "R", "draw": "d"}
    parts = {place.start + n: letters[place.use] for place in layout.images for n in range(place.size)}
    for at, row in zip(layout.token_index.tolist(), layout.tokens.tolist(), strict=True):
        parts[at] = names.get(row) or layouts.vocabulary.decode([row])
    return "".join(parts[at] for at in range(layout.length))


def learned(layouts: Layouts, layout: Layout) -> str:
    names = {row: token for token, row in layouts.vocabulary.control.items()}
    return "".join(names.get(row) or layouts.vocabulary.decode([row]) for row in layout.label_ids.tolist())


def test_an_edit_refers_to_what_the_user_shows_and_draws_what_the_assistant_shows(layouts: Layouts) -> None:
    layout, keys = laid(layouts, EDIT)
    assert spelled(layouts, layout) == (
        "<|im_start|>user\n<|vision_start|>RR<|vision_end|>a red circle<|im_end|>\n"
        "<|im_start|>assistant\n<think>\na blue\n</think>\n<|vision_start|>dd<|vision_end|><|im_end|>\n"
    )
    assert learned(layouts, layout) == "<think>\na blue\n</think>\n<|vision_start|><|im_end|>"
    assert keys == ["a", "b"]
    assert [mode for mode, _ in layout.segments] == ["causal", "full", "causal", "noise", "causal"]


def test_a_question_reads_and_a_drawn_image_that_something_follows_leaves_its_clean_latents(layouts: Layouts) -> None:
    layout, _ = laid(layouts, TALK)
    text = spelled(layouts, layout)
    assert "user\n<|vision_start|>rr<|vision_end|>a red<|im_end|>" in text
    assert "assistant\n<|vision_start|>ddRR<|vision_end|>a blue<|im_end|>" in text
    drawn = next(place for place in layout.images if place.use == "draw")
    assert len(set(layout.rope[drawn.start : drawn.start + 2 * drawn.size])) == 1
    assert learned(layouts, layout) == "a red circle<|im_end|><|vision_start|>a blue<|im_end|>"


def test_a_document_is_learned_from_its_first_token_on(layouts: Layouts) -> None:
    layout, keys = laid(layouts, STORY)
    assert spelled(layouts, layout) == (
        "<|endoftext|>a red circle<|vision_start|>ddRR<|vision_end|>a blue square<|vision_start|>dd<|vision_end|>"
        "<|endoftext|>"
    )
    assert learned(layouts, layout) == "a red circle<|vision_start|>a blue square<|vision_start|><|endoftext|>"
    assert keys == ["a", "k"]


def test_a_conversation_that_goes_on_ends_where_the_assistant_speaks(layouts: Layouts) -> None:
    asked = {"messages": [*TALK["messages"], {"role": "user", "content": "a red"}]}
    whole, _ = laid(layouts, {"messages": [*asked["messages"], TALK["messages"][1]]})
    layout, _ = laid(layouts, asked, goes_on=True)
    assert spelled(layouts, layout).endswith("a red<|im_end|>\n<|im_start|>assistant\n")
    assert spelled(layouts, whole).startswith(spelled(layouts, layout))


def test_conditions_are_left_out_and_exchanges_dropped_from_the_end(layouts: Layouts) -> None:
    edit, talk = Conversation.parse(EDIT, "k"), Conversation.parse(TALK, "k")
    for conversation, absent in ((edit.without(text=True), "circle"), (edit.without(images=True), "R")):
        layout, _ = conversation.layout(layouts, "image_text_to_image", lambda key, read: GRID)
        assert absent not in spelled(layouts, layout)
    assert talk.shorter() == Conversation(talk.messages[:2])
    assert edit.shorter() is None


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"messages": []},
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "robot", "content": "a"}]},
        {"messages": [{"role": "assistant", "content": [{"type": "image"}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "text", "text": " "}]}]},
        {"messages": ["a"]},
        {"document": []},
        {"document": 3},
    ],
)
def test_what_is_not_a_conversation_is_named(content: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="'k' is not a conversation"):
        Conversation.parse(content, "k")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    made = tiny_config(
        tmp_path,
        data={"sets": {"talks": "interleaved"}, "max_bad_fraction": 1.0},
        stages={
            "pretrain": {"mixture": {"interleaved": 1, "text": 1}, "row_positions": 128, "batch": 2, "micro_batches": 1}
        },
    )
    write_tiny_assets(tmp_path)
    write_tiny_sets(made, feature_channels=12)
    return made


def write_talks(config: Config, contents: list[dict[str, Any]]) -> None:
    folder = Path(config.data.path) / "talks"
    folder.mkdir()
    writer = ShardWriter(folder / "talks-000000.tar")
    for number, content in enumerate(contents):
        writer.write(f"t{number}", {"json": json.dumps(content).encode()})
    Manifest(fingerprint="test", shards=[writer.close()]).write(folder)


def loader_of(config: Config) -> PriorLoader:
    channels = config.codec.compressor.channels
    stats = LatentStats(torch.zeros(channels), torch.ones(channels))
    return PriorLoader(config, config.stage("pretrain"), build_vocabulary(config), stats)


def test_talks_about_images_of_the_training_set_are_trained_on(config: Config) -> None:
    first, second = list(open_set(config, "train").keys())[:2]
    named = json.loads(json.dumps([TALK, STORY]).replace('"a"', f'"{first}"').replace('"b"', f'"{second}"'))
    named[1]["document"][3]["image"] = second
    write_talks(config, named)
    with loader_of(config) as loader:
        (batch,) = loader.next_step()
        again = loader.state_dict()
        (following,) = loader.next_step()
    assert "interleaved" in batch.tasks
    assert 0 < len(batch.flow_index) < len(batch.latents)
    clean = torch.ones(len(batch.latents), dtype=torch.bool)
    clean[batch.flow_index] = False
    assert (batch.t[clean] == 1).all()
    with loader_of(config) as other:
        other.load_state_dict(again)
        (resumed,) = other.next_step()
    assert torch.equal(resumed.latents, following.latents)
    assert resumed.keys == following.keys

    model = Transfusion(config.prior, build_vocabulary(config).size, batch.latents.shape[1], 12)
    torch.nn.init.normal_(model.flow_head.out.weight, std=0.1)
    outputs = model(batch)
    assert outputs[1].shape[0] == len(batch.flow_index)
    total(prior_terms(outputs, batch, config.stage("pretrain")), prior_counts(batch)).backward()
    assert model.latent_in.weight.grad is not None


def test_conditions_are_dropped_where_something_is_drawn_alone(config: Config) -> None:
    """An answer about an image is never trained without it."""
    key = next(iter(open_set(config, "train").keys()))
    question = json.loads(json.dumps({"messages": TALK["messages"][:2]}).replace('"a"', f'"{key}"'))
    edit = json.loads(json.dumps(EDIT).replace('"a"', f'"{key}"').replace('"b"', f'"{key}"'))
    write_talks(config, [question, edit])
    dropped = {"condition_dropout": 1.0, "reference_dropout": 1.0}
    prior = config.prior.model_copy(update=dropped)
    with loader_of(config.model_copy(update={"prior": prior})) as loader:
        (batch,) = loader.next_step()
    assert {"t0", "t1"} <= set(batch.keys)
    read = batch.tasks.count("image_to_text") + batch.keys.count("t0")
    assert len(batch.features) == 4 * read, "what is asked about is read"
    assert len(batch.flow_index) == len(batch.latents) > 0, "no reference, only what is drawn"


def test_a_missing_image_is_skipped_counted_and_named(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    first = next(iter(open_set(config, "train").keys()))
    story = {"document": [{"type": "text", "text": "a"}, {"type": "image", "image": first}]}
    write_talks(config, [EDIT, story])
    with loader_of(config) as loader:
        loader.next_step()
        assert loader.report()["data/bad_samples"] >= 1


def test_a_task_without_a_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="image_text_to_image"):
        tiny_config(tmp_path, stages={"pretrain": {"mixture": {"image_text_to_image": 1}}})
