"""Guidance: velocities under less of the condition, extrapolated away from.

With all of the condition v, without the user's words v_text, without the images the user shows v_image:
    v_1 = v_text  + s_text  (v   - v_text)
    v_2 = v_image + s_image (v_1 - v_image)
BAGEL's order (arXiv 2505.14683); unlike there, image guidance also acts where text guidance is 1. v_2 is linear in the
three, so each has a weight, and a branch whose weight is 0 is never computed.
Shapes: P pictures of n latents with d channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from unicom_dist.config.errors import ConfigError

DOCS = "docs/sampling.md"
Branch = Literal["all", "no text", "no image"]
Renorm = Literal["none", "global", "channel"]


@dataclass(frozen=True, slots=True)
class Guidance:
    """Scales, 1 = off; where they act, and what is done about the length that guided velocities gain.

    interval: lo <= t < hi; outside, the condition alone counts and costs one branch.
    renorm: the guided velocity is scaled by |v| / |v_2|, clamped to [renorm_min, 1]; norms of a picture (`global`), or
    of each of its latents (`channel`: over the channels).
    ConfigError: negative scales, an interval outside [0, 1], an unknown renorm.
    """

    text: float = 3.0
    image: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    renorm: Renorm = "none"
    renorm_min: float = 0.0

    def __post_init__(self) -> None:
        lo, hi = self.interval
        if self.text < 0 or self.image < 0:
            raise _bad(f"guidance {self.text}, image guidance {self.image}", "a scale is 0 or more; 1 turns it off")
        if not 0 <= lo <= hi <= 1:
            raise _bad(f"a guidance interval from {lo} to {hi}", "t runs from 0 (noise) to 1 (data)")
        if self.renorm not in get_args(Renorm) or not 0 <= self.renorm_min <= 1:
            raise _bad(f"renorm {self.renorm!r} with minimum {self.renorm_min}", "see the documentation for both")

    def weights(self, with_images: bool) -> dict[Branch, float]:
        """Of each velocity in v_2, those that are not 0. Without images shown there is no image guidance."""
        image = self.image if with_images else 1.0
        weights: dict[Branch, float] = {
            "all": image * self.text,
            "no text": image * (1 - self.text),
            "no image": 1 - image,
        }
        return {branch: weight for branch, weight in weights.items() if weight}

    def branches(self, with_images: bool) -> list[Branch]:
        """What has to be read before drawing; "all" comes first wherever it is needed."""
        needed: list[Branch] = list(self.weights(with_images))
        everywhere = self.interval == (0.0, 1.0) and self.renorm == "none"
        return needed if everywhere or "all" in needed else ["all", *needed]

    def acts(self, t: float) -> bool:
        """Whether t is in the interval."""
        return self.interval[0] <= t < self.interval[1]

    def combine(self, velocities: Mapping[Branch, Tensor], with_images: bool) -> Tensor:
        """v_2 of the branches' velocities [P, n, d], renormalised."""
        weights = self.weights(with_images)
        if list(weights) == ["all"]:  # to the bit
            return velocities["all"]
        guided = sum_of([weight * velocities[branch] for branch, weight in weights.items()])
        if self.renorm == "none":
            return guided
        axes = (-2, -1) if self.renorm == "global" else (-1,)
        given = torch.linalg.vector_norm(velocities["all"], dim=axes, keepdim=True)
        gained = torch.linalg.vector_norm(guided, dim=axes, keepdim=True)
        factor: Tensor = (given / gained.clamp_min(1e-8)).clamp(self.renorm_min, 1.0)
        return guided * factor


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of at least one tensor."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _bad(what: str, why: str) -> ConfigError:
    return ConfigError(what, why, "choose other values", DOCS)
