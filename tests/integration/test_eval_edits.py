"""Edits in the quick suite and in the picture grids of training, on untrained tiny models. 1 process."""

import json
from pathlib import Path

import pytest
import torch
from encoded_sets import write_features
from PIL import Image

from pipelines import ingest
from unicom_dist.config.schema import Config
from unicom_dist.data.conversations import Conversation
from unicom_dist.data.shardset import ShardSet
from unicom_dist.evaluate import quick
from unicom_dist.evaluate.edits import PictureEdit, draw_edits, edit_rows, read_edits, single_edit
from unicom_dist.evaluate.heldout import to_unit
from unicom_dist.evaluate.quick import Networks
from unicom_dist.models.encoders import encoder_fingerprint
from unicom_dist.sample.pictures import Latents
from unicom_dist.sample.pipeline import UniComPipeline
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets
from unicom_dist.testing.tiny_run import tiny_prior, write_tiny_weights
from unicom_dist.train.prior import PriorTask

CHEAP = Networks(lambda pictures: to_unit(pictures).flatten(1), lambda a, b: (a - b).square().flatten(1).mean(1))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("eval-edits")
    write_tiny_assets(folder, pictures=36)
    made = tiny_config(
        folder,
        data={"edits": 24, "sets": {"edits": "image_text_to_image"}},
        stages={"sft": {"mixture": {"image_text_to_image": 1}}},
    )
    ingest.run(made, workers=1)
    write_features(made, ("train", "heldout", "edits", "edits-heldout"))
    write_tiny_weights(made)
    return made


@pytest.fixture(scope="module")
def pipeline(config: Config) -> UniComPipeline:
    return UniComPipeline.from_pretrained(config.run_dir)


@pytest.fixture(scope="module")
def edits(config: Config) -> list[PictureEdit]:
    return read_edits(config, encoder_fingerprint(config.encoder), 64)


def test_edits_are_read_with_the_pictures_that_they_show(config: Config, edits: list[PictureEdit]) -> None:
    stored = ShardSet(Path(config.data.path) / "edits-heldout")
    assert [edit.target.key for edit in edits] == list(stored.keys())
    held_out = set(ShardSet(Path(config.data.path) / "heldout").keys())
    assert {pair.key for edit in edits for pair in edit.references} <= held_out
    assert {len(edit.references) for edit in edits} == {1, 2}
    without = config.model_copy(update={"data": config.data.model_copy(update={"sets": {}})})
    assert read_edits(without, encoder_fingerprint(config.encoder), 64) == []


def test_only_pictures_and_words_that_get_one_picture_are_edits() -> None:
    shown, said, reply = (
        {"type": "image", "image": "a"},
        {"type": "text", "text": "x"},
        {"type": "image", "image": ""},
    )

    def parsed(*turns: list[dict[str, str]]) -> Conversation:
        roles = ("user", "assistant") * 2
        messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
        return Conversation.parse({"messages": messages}, "k")

    assert single_edit(parsed([shown, said], [reply])) == (["a"], "x", "k")
    assert single_edit(parsed([said], [reply])) is None
    assert single_edit(parsed([shown], [reply])) is None
    assert single_edit(parsed([shown, said], [said])) is None
    assert single_edit(parsed([shown, said], [reply], [said], [reply])) is None


def test_what_is_drawn_depends_on_words_and_references_and_not_on_the_others(
    config: Config, pipeline: UniComPipeline, edits: list[PictureEdit], monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = config.model_copy(update={"sample": config.sample.model_copy(update={"steps": 4})})
    drawn: list[torch.Tensor] = []

    def kept(latents: list[Latents], *_: object, **__: object) -> list[Image.Image]:
        drawn.append(torch.stack([item.values for item in latents]))
        return [Image.new("RGB", (16, 16))] * len(latents)

    monkeypatch.setattr(pipeline, "decode", kept)
    first, *others = edits
    words = PictureEdit(first.references, others[-1].instruction, first.target)
    shown = PictureEdit(others[-1].references, first.instruction, first.target)
    for asked in ([first], edits, [words], [shown]):
        draw_edits(pipeline, asked, fine)
    alone = drawn[0][0]
    torch.testing.assert_close(drawn[1][0], alone, rtol=1e-4, atol=1e-5)
    for changed in drawn[2:]:
        assert (changed[0] - alone).abs().max() > 1e-3


def test_rows_compare_with_the_untrained_model_and_the_reference(
    config: Config, pipeline: UniComPipeline, edits: list[PictureEdit]
) -> None:
    targets = [edit.target.picture for edit in edits]
    lpips, psnr = edit_rows(edits, targets, targets[::-1], pipeline, config, CHEAP.lpips)
    assert (lpips.value, psnr.value) == (0, 100)
    assert lpips.untrained is not None
    assert lpips.untrained > 0
    for row in (lpips, psnr):
        assert row.split == "heldout edits"
        assert row.trivial is not None
        assert row.trivial[0] == "reference unchanged"
        assert row.beats_all


def test_the_quick_suite_measures_edits(config: Config) -> None:
    rows = quick.run(config.run_dir, CHEAP)
    found = {(row.metric, row.split): row for row in rows}
    for key in (
        ("flow loss", "heldout edits, sft"),
        ("edit: LPIPS (VGG)", "heldout edits"),
        ("edit: PSNR (dB)", "heldout edits"),
    ):
        assert found[key].untrained is not None
        assert found[key].n == 4
    with Image.open(Path(config.run_dir) / "samples" / "eval" / "edits.png") as picture:
        assert picture.width > 6 * 128
    again = quick.run(config.run_dir, CHEAP)
    assert again == rows


def test_a_stage_that_trains_edits_shows_them_and_measures_their_flow(config: Config) -> None:
    from unicom_dist.train.pipeline import prepare_vocabulary

    prepare_vocabulary(config)
    (Path(config.run_dir) / "latents" / "stats.json").write_text(
        json.dumps(UniComPipeline.from_pretrained(config.run_dir).prior.stats.to_json())
    )
    heights = {}
    for name in ("continue", "sft"):
        task = PriorTask(config, config.stage(name))
        suffixes = {suffix for suffix, _ in task.heldout()}
        assert ({"_edits@0.3", "_edits@0.7"} <= suffixes) == (name == "sft")
        model = tiny_prior(config, task._vocabulary)
        picture, labels = task.draw(model)
        heights[name] = picture.height
        assert (len(labels) > 2) == (name == "sft")
    assert heights["sft"] > heights["continue"] + 128
