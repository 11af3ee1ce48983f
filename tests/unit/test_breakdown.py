"""Means by task, time, shape and size add up to the losses themselves. One process."""

import pytest
import torch

from unicom_dist.models.segments import PackedBatch
from unicom_dist.objective.breakdown import TASKS, flow_averages, kinds_of, means, names_of, text_averages

GRIDS = [(4, 4), (2, 8), (3, 2)]  # rows x columns: 1:1, 4:1, 2:3
TIMES = [0.1, 0.5, 1.0]
DRAWN = ["text_to_image", "text_to_image", "image_text_to_image"]
SETS = ["train", "photos", "edits", "books"]
NAMES = names_of(SETS)


def batch_of() -> PackedBatch:
    """A caption, three drawn images, and before the last of them a reference of another shape."""
    none, grids = torch.zeros(0, dtype=torch.int64), [*GRIDS[:2], (1, 3), GRIDS[2]]
    sizes = [rows * columns for rows, columns in grids]
    places = [torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) for rows, columns in grids]
    drawn = torch.tensor([True] * 32 + [False] * 3 + [True] * 6)
    draw = torch.Generator().manual_seed(0)
    return PackedBatch(
        segments=[],
        rope_positions=none,
        token_ids=none,
        token_index=none,
        label_index=torch.arange(5),
        label_ids=torch.arange(5),
        latents=torch.randn(sum(sizes), 4, generator=draw),
        noise=torch.randn(sum(sizes), 4, generator=draw),
        t=torch.repeat_interleave(torch.tensor([*TIMES[:2], 1.0, TIMES[2]]), torch.tensor(sizes)),
        flow_index=drawn.nonzero()[:, 0],
        latent_index=torch.arange(sum(sizes)),
        latent_grid=torch.cat(places),
        features=torch.zeros(0, 3),
        feature_index=none,
        feature_grid=torch.zeros(0, 2, dtype=torch.int64),
        keys=list("abcd"),
        tasks=["text", *DRAWN],
        sources=["books", "train", "photos", "edits"],
        label_sample=torch.tensor([0, 0, 0, 1, 3]),
        latent_sample=torch.repeat_interleave(torch.tensor([1, 2, 3, 3]), torch.tensor(sizes)),
    )


def test_each_mean_is_that_of_its_items() -> None:
    batch = batch_of()
    errors = torch.rand(38, generator=torch.Generator().manual_seed(1))
    parts = torch.split(errors, [16, 16, 6])
    found = means(NAMES["flow"], flow_averages(errors, batch, kinds_of(batch, SETS)).tolist())
    expected = {
        "loss_by_task/flow/text_to_image": errors[:32].mean(),
        "loss_by_task/flow/image_text_to_image": parts[2].mean(),
        "loss_by_set/flow/train": parts[0].mean(),
        "loss_by_set/flow/photos": parts[1].mean(),
        "loss_by_set/flow/edits": parts[2].mean(),
        "loss_by_t/flow/0.0-0.2": parts[0].mean(),
        "loss_by_t/flow/0.4-0.6": parts[1].mean(),
        "loss_by_t/flow/0.8-1.0": parts[2].mean(),
        "loss_by_ratio/flow/1:1": parts[0].mean(),
        "loss_by_ratio/flow/4:1": parts[1].mean(),
        "loss_by_ratio/flow/2:3": parts[2].mean(),
        "loss_by_latents/flow/16": errors[:32].mean(),
        "loss_by_latents/flow/8": parts[2].mean(),
        "latents/mean": batch.latents[batch.flow_index].mean(),
        "latents/mean_square": batch.latents[batch.flow_index].square().mean(),
    }
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)


def test_tasks_and_sets_of_the_text() -> None:
    batch = batch_of()
    losses = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0])
    averages = text_averages(losses, batch, kinds_of(batch, SETS))
    assert averages.shape == (2, len(NAMES["text"])) == (2, len(TASKS) + len(SETS))
    assert means(NAMES["text"], averages.tolist()) == {
        "loss_by_set/text/books": 2.0,
        "loss_by_set/text/train": 5.0,
        "loss_by_set/text/edits": 7.0,
        "loss_by_task/text/text": 2.0,
        "loss_by_task/text/text_to_image": 5.0,
        "loss_by_task/text/image_text_to_image": 7.0,
    }


def test_a_batch_without_images_has_nothing_by_image() -> None:
    batch = batch_of()
    nothing = torch.zeros(0, dtype=torch.int64)
    batch.flow_index = nothing
    assert means(NAMES["flow"], flow_averages(torch.zeros(0), batch, kinds_of(batch, SETS)).tolist()) == {}
