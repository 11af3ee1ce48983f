"""What an image that is read enters as: features, these beside latents, or before latents. One process, seconds."""

from pathlib import Path
from typing import Any

import pytest
import torch

from unicom_dist.config.errors import ConfigError, DataError
from unicom_dist.config.schema import Config
from unicom_dist.data.conversations import Message
from unicom_dist.data.loader import PriorLoader, build_vocabulary, heldout_prior_batches
from unicom_dist.data.samples import INSTRUCTION, Layouts, Words, collate
from unicom_dist.models.codec import LatentStats
from unicom_dist.models.segments import PackedBatch
from unicom_dist.models.transfusion import Transfusion
from unicom_dist.sample.dialogue import Dialogue, Seen
from unicom_dist.testing.shards import write_tiny_sets
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets

STATS = LatentStats(torch.arange(4) / 10, 1 + torch.arange(4) / 10)
MODES = ["raw", "dim_concat", "seq_concat"]
GRID, COUNT = (2, 3), 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("understanding")
    write_tiny_assets(folder)
    write_tiny_sets(config(folder, "raw"), 12, grids=[GRID])
    return folder


def config(folder: Path, understanding: str, **others: Any) -> Config:
    return tiny_config(folder, prior={"understanding": understanding}, **others)


def read(folder: Path, understanding: str, task: str = "image_to_text") -> PackedBatch:
    recipe = config(folder, understanding)
    return next(heldout_prior_batches(recipe, build_vocabulary(recipe), STATS, 0.3, 1, tasks=(task,)))


def test_features_stand_alone_beside_the_latents_or_before_them(folder: Path) -> None:
    raw, beside, before = (read(folder, mode) for mode in MODES)
    latents = read(folder, "raw", "text_to_image").latents  # of the same image
    width = raw.features.shape[1]
    assert raw.latents.shape[0] == beside.latents.shape[0] == 0
    assert beside.num_positions == raw.num_positions == before.num_positions - COUNT
    assert torch.equal(beside.features[:, :width], raw.features.float())
    torch.testing.assert_close(beside.features[:, width:], latents)
    assert torch.equal(before.features, raw.features)
    torch.testing.assert_close(before.latents, latents)
    assert (before.t == 1).all()
    assert len(before.flow_index) == 0
    assert torch.equal(before.latent_index, before.feature_index + COUNT)
    assert torch.equal(before.latent_grid, before.feature_grid)
    assert [segment.length for segment in before.segments if segment.mode == "full"] == [2 * COUNT]


@pytest.mark.parametrize("understanding", MODES)
def test_a_sampler_reads_an_image_as_training_does(folder: Path, understanding: str) -> None:
    recipe, trained = config(folder, understanding), read(folder, understanding)
    features = read(folder, "raw").features.float()
    seen = Seen(features, GRID, read(folder, "raw", "text_to_image").latents, GRID)
    layouts = Layouts(build_vocabulary(recipe), recipe.prior)
    dialogue = Dialogue((Message("user", ("0", Words(INSTRUCTION))),), {"0": seen})
    channels = recipe.prior.read_channels(features.shape[1], 4)
    batch = collate([dialogue.content(layouts, understanding)], 4, channels)
    assert torch.equal(batch.features, trained.features.float())
    assert torch.equal(batch.latents, trained.latents)
    for name in ("feature_index", "latent_index", "feature_grid", "latent_grid"):
        assert torch.equal(getattr(batch, name), getattr(trained, name)), name
    assert torch.equal(batch.rope_positions, trained.rope_positions[: batch.num_positions])
    assert torch.equal(batch.token_ids, trained.token_ids[: len(batch.token_ids)])


@pytest.mark.parametrize("understanding", MODES)
def test_every_form_reaches_the_text(folder: Path, understanding: str) -> None:
    recipe, batch = config(folder, understanding), read(folder, understanding)
    torch.manual_seed(0)
    network = Transfusion(recipe.prior, build_vocabulary(recipe).size, 4, read(folder, "raw").features.shape[1])
    losses, _ = network(batch)
    parts = [batch.features] if understanding != "seq_concat" else [batch.features, batch.latents]
    for part in parts:
        for columns in part[:, :1], part[:, -1:]:  # of the features and, beside them, of the latents
            columns += 1
            after, _ = network(batch)
            columns -= 1
            assert (losses != after).any()


def test_training_rows_hold_the_latents_that_are_read(folder: Path) -> None:
    recipe = config(
        folder,
        "seq_concat",
        stages={"pretrain": {"mixture": {"text_to_image": 0, "text": 0, "image_to_text": 1}, "row_positions": 96}},
    )
    with PriorLoader(recipe, recipe.stage("pretrain"), build_vocabulary(recipe), STATS) as loader:
        (batch,) = loader.next_step()[:1]
    assert batch.features.shape[0] == batch.latents.shape[0] > 0
    assert batch.latents.isfinite().all()


def test_other_grids_of_the_latents_are_named(tmp_path: Path) -> None:
    write_tiny_assets(tmp_path)
    write_tiny_sets(config(tmp_path, "raw"), 12, grids=[GRID])
    elsewhere = config(tmp_path, "dim_concat", data={"path": str(tmp_path / "other")})
    write_tiny_sets(elsewhere, 12, grids=[(1, 2)])  # the latents of this run are these now
    recipe = config(tmp_path, "dim_concat")
    with pytest.raises(DataError, match="different grids"):
        next(heldout_prior_batches(recipe, build_vocabulary(recipe), STATS, 0.3, 1, tasks=("image_to_text",)))


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ({"codec": {"compressor": {"spatial": "pool"}}}, "spatial"),
        ({"stages": {"pretrain": {"joint": {"enabled": True}}}}, "joint"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, others: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"prior.understanding = seq_concat with .*{named}"):
        config(tmp_path, "seq_concat", **others)
