"""Whether the latents of joint training still say something: their spread and rank against what they were.

A flow loss can be made small by making the latents flat or all alike. The detached target and the reconstruction keep
them from it; this finds out when they do not suffice.
Shapes: d latent channels.
"""

from dataclasses import dataclass

from torch import Tensor

from unicom_dist.config.errors import CollapseError
from unicom_dist.config.schema import JointConfig

DOCS = "docs/training.md#joint-training"


@dataclass(frozen=True)
class Spread:
    """What the raw latents look like: std of each channel [d], and effective rank (0 = not measured)."""

    std: Tensor
    rank: float

    def figures(self, mean: Tensor) -> dict[str, float]:
        """For the metrics."""
        values = {
            "latents/mean_abs": float(mean.abs().mean()),
            "latents/std_min": float(self.std.min()),
            "latents/std_mean": float(self.std.mean()),
        }
        return values | ({"latents/effective_rank": self.rank} if self.rank else {})


def check_spread(now: Spread, start: Spread, joint: JointConfig, stage: str, step: int) -> None:
    """CollapseError when the smallest or mean deviation, or the rank above 1, is below its share of the start."""
    limit = joint.collapse
    found = ""
    if float(now.std.min()) < limit * float(start.std.min()):
        found = f"the smallest channel deviation is {float(now.std.min()):.3g}, it was {float(start.std.min()):.3g}"
    elif float(now.std.mean()) < limit * float(start.std.mean()):
        found = f"the mean channel deviation is {float(now.std.mean()):.3g}, it was {float(start.std.mean()):.3g}"
    elif now.rank and now.rank - 1 < limit * (start.rank - 1):
        found = f"the effective rank is {now.rank:.2f} of {len(now.std)} channels, it was {start.rank:.2f}"
    if not found:
        return
    weak = (now.std < limit * start.std).nonzero()[:, 0].tolist()
    channels = f" (channels {ranges(weak)})" if weak else ""
    raise CollapseError(
        f"the latents of stage {stage!r} collapsed by step {step}: {found}{channels}",
        f"stages.{stage}.joint.collapse = {limit:g} is the least share of the start; flat latents are easy to predict"
        " and say nothing about the picture",
        f"raise stages.{stage}.joint.lambda_recon or lower stages.{stage}.lr, and remove the last checkpoints of"
        f" {stage} if the metrics latents/* had fallen by then",
        DOCS,
    )


def ranges(numbers: list[int]) -> str:
    """Ascending numbers, as "0-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
