"""What the losses of a prior are made of: means by task, by set, by time, by shape and size of the image.

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


def names_of(sources: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Of every term's averages, in their order. `sources`: the sets that samples may be of."""
    by_set = {term: tuple(f"loss_by_set/{term}/{name}" for name in sources) for term in ("text", "flow")}
    return {
        "text": (*(f"loss_by_task/text/{task}" for task in TASKS), *by_set["text"]),
        "flow": (
            *(f"loss_by_task/flow/{task}" for task in TASKS),
            *by_set["flow"],
            *(f"loss_by_t/flow/{k / TIMES:.1f}-{(k + 1) / TIMES:.1f}" for k in range(TIMES)),
            *(f"loss_by_ratio/flow/{ratio}" for ratio in RATIOS),
            *(f"loss_by_latents/flow/{2**k}" for k in range(SIZES)),
            "latents/mean",
            "latents/mean_square",
        ),
    }


@dataclass(frozen=True, slots=True)
class Kinds:
    """Of every sample of a batch, numbers in `TASKS`, of the `sources` there are, in `RATIOS`, of its size: [P] int64.

    A sample that draws several images is of the shape that holds them all.
    """

    sources: int
    task: Tensor
    source: Tensor
    ratio: Tensor
    size: Tensor


def kinds_of(batch: PackedBatch, sources: Sequence[str]) -> Kinds:
    """Of a whole batch: a rank's share of it does not hold whole images. Its samples are of sets of `sources`."""
    device = batch.latent_grid.device
    numbers = [[TASKS.index(task) for task in batch.tasks], [sources.index(name) for name in batch.sources]]
    task, source = torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=True)
    drawn = batch.flow_index
    extent = torch.ones(len(batch.tasks), 2, dtype=torch.long, device=device)
    sample = batch.latent_sample[drawn, None].expand(-1, 2)
    extent.scatter_reduce_(0, sample, batch.latent_grid[drawn] + 1, "amax")
    rows, columns = extent.float().unbind(1)
    ratio = torch.bucketize(columns / rows, torch.tensor(_BETWEEN, device=device))
    size = (rows * columns).log2().ceil().long().clamp_max(SIZES - 1)
    return Kinds(len(sources), task, source, ratio, size)


def text_averages(losses: Tensor, batch: PackedBatch, kinds: Kinds) -> Tensor:
    """[2, K] sums and counts of cross-entropies [Y], by the K names of the text."""
    sample = batch.label_sample
    return _count(losses.detach(), [kinds.task[sample], kinds.source[sample]], [len(TASKS), kinds.sources])


def flow_averages(errors: Tensor, batch: PackedBatch, kinds: Kinds) -> Tensor:
    """[2, K] sums and counts of flow errors [F] and of the latents being denoised, by the K names of the flow."""
    drawn = batch.flow_index
    sample = batch.latent_sample[drawn]
    time = (batch.t[drawn] * TIMES).long().clamp_max(TIMES - 1)
    parts = [kinds.task[sample], kinds.source[sample], time, kinds.ratio[sample], kinds.size[sample]]
    found = _count(errors.detach(), parts, [len(TASKS), kinds.sources, TIMES, len(RATIOS), SIZES])
    latents = batch.latents[drawn].detach().float()
    squares = torch.stack([latents.mean(1).sum(), latents.square().mean(1).sum()])
    return torch.cat([found, torch.stack([squares, torch.full_like(squares, drawn.shape[0])])], 1)


def _count(values: Tensor, parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Sums and counts [2, sum(sizes)] of values [n], each in one place of every part: part k has `sizes[k]` of them."""
    found = torch.zeros(2, sum(sizes), device=values.device)
    both = torch.stack([values.float(), torch.ones_like(values, dtype=torch.float32)])
    starts = itertools.accumulate(sizes[:-1], initial=0)
    places = torch.cat([part + start for part, start in zip(parts, starts, strict=True)])
    found.index_add_(1, places, both.repeat(1, len(parts)))
    return found


def means(names: Sequence[str], averages: Sequence[Sequence[float]]) -> dict[str, float]:
    """By name, of what occurred, from (sums, counts) of all ranks."""
    sums, counts = averages
    return {name: value / count for name, value, count in zip(names, sums, counts, strict=True) if count}
