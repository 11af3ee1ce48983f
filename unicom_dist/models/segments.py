"""What a packed batch holds: samples laid end to end on one axis, and the segments that say who sees whom.

A packed row holds several samples; several rows are simply more samples on the same axis, because segments never cross
samples.
Shapes: S positions, T text tokens, Y labels, N latents of d channels, F of them being denoised, M understanding
features of D channels.
Empty modalities are zero-length tensors, never None, so that every rank runs every part of the model.
"""

from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, Optional

import torch
from torch import Tensor

from unicom_dist.models.flow import interpolate

if TYPE_CHECKING:
    from unicom_dist.models.attention import Plan

Mode = Literal["causal", "full", "noise"]


@dataclass(frozen=True, slots=True)
class Segment:
    """`length` consecutive positions of one sample that share a visibility mode.

    causal: text, a position sees what is not later. full: a clean image, its positions see each other.
    noise: latents being denoised, they see each other and nobody else sees them.
    """

    sample: int
    mode: Mode
    length: int


@dataclass(slots=True)
class PackedBatch:
    """One or several packed rows on a single axis of S positions.

    Positions of one sample are consecutive and its segments are in order; `sum(segment lengths) == S`.
    Every position is a text token, a latent, a feature or a time: `token_index`, `latent_index`, `feature_index` and
    `time_index` partition `range(S)`. `label_index` are distinct positions: their hidden states predict `label_ids`.
    """

    segments: list[Segment]
    rope_positions: Tensor  # [S] int64, restarts at 0 per sample, all positions of an image share one id; or [S, 2]
    token_ids: Tensor  # [T] int64
    token_index: Tensor  # [T] int64
    label_index: Tensor  # [Y] int64
    label_ids: Tensor  # [Y] int64
    latents: Tensor  # [N, d] clean and normalised; not a number where a compressor in training makes them
    noise: Tensor  # [N, d]
    t: Tensor  # [N], one value per image, repeated; t = 1 is data
    flow_index: Tensor  # [F] int64, ascending: the latents being denoised; the others are clean references, t = 1
    latent_index: Tensor  # [N] int64
    latent_grid: Tensor  # [N, 2] int64, (row, column)
    features: Tensor  # [M, D] raw encoder features
    feature_index: Tensor  # [M] int64
    feature_grid: Tensor  # [M, 2] int64
    keys: list[str]  # per sample
    tasks: list[str]  # per sample
    sources: list[str]  # per sample: the set it is of
    label_sample: Tensor  # [Y] int64, sample number of each label
    latent_sample: Tensor  # [N] int64
    target_features: Tensor = field(default_factory=partial(torch.zeros, 0, 0))  # [N, D], then; else empty
    time_index: Tensor = field(default_factory=partial(torch.zeros, 0, dtype=torch.int64))  # [I] int64, of time tokens
    times: Tensor = field(default_factory=partial(torch.zeros, 0))  # [I], what they say
    plan: Optional["Plan"] = None  # how `segments` attend, where that was prepared with the batch

    @property
    def num_positions(self) -> int:
        """S."""
        return self.rope_positions.shape[0]

    def denoised(self) -> tuple[Tensor, Tensor]:
        """z_t [F, d] of the latents being denoised and their times [F], both float32."""
        data, noise, t = (rows[self.flow_index].float() for rows in (self.latents, self.noise, self.t))
        return interpolate(data, noise, t), t

    def to(self, device: torch.device | str) -> "PackedBatch":
        """A copy whose tensors are on `device`; dtypes are kept (the model casts at its border)."""
        tensors = {item.name: getattr(self, item.name) for item in fields(self) if item.type is Tensor}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return replace(self, **moved, plan=self.plan and self.plan.to(device))


def centred(grid: Tensor) -> Tensor:
    """Rows and columns [..., n, 2] of a whole image, moved to the middle of the square that holds it.

    The square's longer side is how far an image moves the text after it when positions are two-dimensional.
    """
    size = grid.amax(-2, keepdim=True) + 1
    return grid + (size.amax(-1, keepdim=True) - size) // 2
