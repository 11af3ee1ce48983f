"""What the losses of a prior are made of: means by task, by time, by shape and size of the image.

Each is a sum over items with its count, in a fixed order of names, so that all ranks' figures travel in one vector. P
samples; the other shapes as in `models/segments.py`.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unicom_dist.config.schema import Mixture
from unicom_dist.models.segments import PackedBatch

TASKS = tuple(Mixture.model_fields)
TIMES = 5  # equal parts of [0, 1]
RATIOS = ("1:4", "1:3", "1:2", "2:3", "1:1", "3:2", "2:1", "3:1", "4:1")  # width to height; the nearest counts
SIZES = 14  # an image of n latents is of size k where 2^(k-1) < n <= 2^k


def _ratio(name: str) -> float:
    width, height = name.split(":")
    return int(width) / int(height)


_BETWEEN = [math.sqrt(_ratio(a) * _ratio(b)) for a, b in itertools.pairwise(RATIOS)]
NAMES: dict[str, tuple[str, ...]] = {  # of a term's averages, in their order
    "text": tuple(f"loss_by_task/text/{task}" for task in TASKS),
    "flow": (
        *(f"loss_by_task/flow/{task}" for task in TASKS),
        *(f"loss_by_t/flow/{k / TIMES:.1f}-{(k + 1) / TIMES:.1f}" for k in range(TIMES)),
        *(f"loss_by_ratio/flow/{ratio}" for ratio in RATIOS),
        *(f"loss_by_latents/flow/{2**k}" for k in range(SIZES)),
        "latents/mean",
        "latents/mean_square",
    ),
}


@dataclass(frozen=True, slots=True)
class Kinds:
    """Of every sample of a batch, numbers in `TASKS`, `RATIOS` and of its size: [P] int64 each.

    A sample that draws several images is of the shape that holds them all.
    """

    task: Tensor
    ratio: Tensor
    size: Tensor


def kinds_of(batch: PackedBatch) -> Kinds:
    """Of a whole batch: a rank's share of it does not hold whole images."""
    device = batch.latent_grid.device
    task = torch.tensor([TASKS.index(task) for task in batch.tasks], dtype=torch.long).to(device, non_blocking=True)
    drawn = batch.flow_index
    extent = torch.ones(len(batch.tasks), 2, dtype=torch.long, device=device)
    sample = batch.latent_sample[drawn, None].expand(-1, 2)
    extent.scatter_reduce_(0, sample, batch.latent_grid[drawn] + 1, "amax")
    rows, columns = extent.float().unbind(1)
    ratio = torch.bucketize(columns / rows, torch.tensor(_BETWEEN, device=device))
    size = (rows * columns).log2().ceil().long().clamp_max(SIZES - 1)
    return Kinds(task, ratio, size)


def text_averages(losses: Tensor, batch: PackedBatch, kinds: Kinds) -> Tensor:
    """[2, K] sums and counts, K = len(NAMES["text"]), of cross-entropies [Y]."""
    return _count("text", losses.detach(), [kinds.task[batch.label_sample]])


def flow_averages(errors: Tensor, batch: PackedBatch, kinds: Kinds) -> Tensor:
    """[2, K] sums and counts, K = len(NAMES["flow"]), of flow errors [F] and of the latents being denoised."""
    drawn = batch.flow_index
    sample = batch.latent_sample[drawn]
    time = (batch.t[drawn] * TIMES).long().clamp_max(TIMES - 1)
    parts = [kinds.task[sample], time, kinds.ratio[sample], kinds.size[sample]]
    starts = [0, len(TASKS), len(TASKS) + TIMES, len(TASKS) + TIMES + len(RATIOS)]
    found = _count("flow", errors.detach(), [part + start for part, start in zip(parts, starts, strict=True)])
    latents = batch.latents[drawn].detach().float()
    found[0, -2], found[0, -1] = latents.mean(1).sum(), latents.square().mean(1).sum()
    found[1, -2:] = drawn.shape[0]
    return found


def _count(term: str, values: Tensor, places: Sequence[Tensor]) -> Tensor:
    found = torch.zeros(2, len(NAMES[term]), device=values.device)
    both = torch.stack([values.float(), torch.ones_like(values, dtype=torch.float32)])
    found.index_add_(1, torch.cat(list(places)), both.repeat(1, len(places)))
    return found


def means(term: str, averages: Sequence[Sequence[float]]) -> dict[str, float]:
    """By name, of what occurred, from (sums, counts) of all ranks."""
    sums, counts = averages
    return {name: value / count for name, value, count in zip(NAMES[term], sums, counts, strict=True) if count}
