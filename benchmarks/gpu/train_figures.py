"""What the training benchmark measures: the clock, what a plan says of the same step, the figures and their goals."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from common import Goal, Timing
from train_rows import FEATURE_CHANNELS, LATENT_CHANNELS, ROWS, Size

from unicom_dist.config.layout import Layout
from unicom_dist.config.schema import PriorConfig
from unicom_dist.models.segments import PackedBatch
from unicom_dist.plan.activations import Batch
from unicom_dist.plan.hardware import USABLE
from unicom_dist.plan.memory import Memory, rank_memory
from unicom_dist.plan.parameters import Sizes
from unicom_dist.tracking.flops import Peak

WARM_UP = 2
LOGIT_BYTES = 14  # a logit of transformers' loss: bfloat16, float32, and gradients of both, with a copy
PEER, PEER_COMPILED = "transformers", "transformers, torch.compile"


@dataclass(frozen=True)
class Measured:
    """Seconds of each step of a round, and the most bytes allocated in it (0 where torch does not count)."""

    seconds: list[float]
    peak: int


def measured(step: Callable[[], object], steps: int, device: torch.device) -> Measured:
    """After `WARM_UP` steps that do not count."""
    gpu, seconds = device.type == "cuda", []
    if gpu:
        torch.cuda.empty_cache()
    for _ in range(WARM_UP):
        step()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return Measured(seconds, torch.cuda.max_memory_allocated() if gpu else 0)


def plan(size: Size, prior: PriorConfig, layout: Layout, row: PackedBatch, precision: str) -> Memory:
    """What `unicom plan` says of a step of such rows."""
    sizes = Sizes(size.vocabulary, LATENT_CHANNELS, FEATURE_CHANNELS)
    batch = Batch(row.num_positions, len(row.label_ids) / row.num_positions, size.micro_batches)
    return rank_memory(prior, sizes, layout, batch, 0, precision)


def fitting(size: Size, layout: Layout, row: PackedBatch, device: torch.device) -> PriorConfig:
    """The shape with all its layers, or with as many as the card can train."""
    if device.type != "cuda" or plan(size, size.prior, layout, row, "bfloat16").total <= room(device):
        return size.prior
    left = room(device) - LOGIT_BYTES * row.num_positions * size.vocabulary
    for layers in range(size.prior.layers - 1, 0, -1):
        prior = size.prior.model_copy(update={"layers": layers})
        if plan(size, prior, layout, row, "bfloat16").total <= left:
            return prior
    raise SystemExit(f"not measured: not one layer of hidden = {size.prior.hidden} fits this GPU")


def room(device: torch.device) -> int:
    """Bytes of the card that a plan may use."""
    return int(USABLE * torch.cuda.get_device_properties(device).total_memory)


@dataclass(frozen=True)
class Figure:
    """A method on a row."""

    size: str
    layers: int  # that were trained, of `of_layers` that the model has
    of_layers: int
    recompute: str
    micro_batches: int
    row: str
    method: str
    seconds: Timing  # of a step
    tokens: int  # in a step
    flops: float  # of a step
    visible_share: float  # of all pairs of positions of a row
    peak_bytes: int
    plan_bytes: dict[str, int]
    plan_total_bytes: int
    plan_whole_bytes: int  # with all layers

    @property
    def tokens_per_s(self) -> float:
        """Positions of any kind."""
        return self.tokens / self.seconds.median

    def mfu(self, flops_per_s: float) -> float:
        """Share of a peak."""
        return self.flops / self.seconds.median / flops_per_s

    def record(self, gemm: float, sheet: Peak | None) -> dict[str, Any]:
        """For the JSON."""
        derived = {"tokens_per_s": self.tokens_per_s, "mfu_gemm": self.mfu(gemm)}
        return asdict(self) | derived | ({"mfu_sheet": self.mfu(sheet.flops_per_s)} if sheet else {})

    def cells(self, gemm: float, sheet: Peak | None) -> list[str]:
        """For the table."""
        cut = "" if self.layers == self.of_layers else f", {self.layers} of {self.of_layers} layers"
        return [
            self.size + cut,
            self.row,
            self.method,
            f"{self.tokens_per_s:,.0f}",
            f"{self.mfu(sheet.flops_per_s):.3f}" if sheet else "-",
            f"{self.mfu(gemm):.3f}",
            f"{self.peak_bytes / 1e9:.1f}" if self.peak_bytes else "-",
            f"{self.plan_total_bytes / 1e9:.1f}" if self.peak_bytes else "-",
            self.seconds.spread,
        ]


def goals_of(found: Sequence[Figure], sheet: Peak) -> Iterator[Goal]:
    """Of the best of our methods on each row."""
    for name in dict.fromkeys(figure.size for figure in found):
        own = [figure for figure in found if figure.size == name]
        mine = {
            row: min((f for f in own if f.row == row and PEER not in f.method), key=lambda f: f.seconds.median)
            for row in ROWS
        }
        mix, bound = mine["mix8k"], {"1.5B": 0.47, "7B": 0.50}.get(name)
        if bound:
            yield Goal(f"{name}: MFU, data sheet", mix.mfu(sheet.flops_per_s), bound, unit="")
        off = 100 * abs(mix.peak_bytes / mix.plan_total_bytes - 1)
        yield Goal(f"{name}: peak against plan", off, 3, at_least=False, unit="%")
        for eager in (figure for figure in own if figure.method == PEER):
            ratio = eager.seconds.median / mine["text"].seconds.median
            yield Goal(f"{name}: over transformers, text", ratio, 1.15)
