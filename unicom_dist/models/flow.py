"""Rectified flow: the path, its target, and how times are drawn.

Time: t = 1 is data. z_t = t z1 + (1 - t) eps and v = dz_t/dt = z1 - eps. Ref: UniCom arXiv 2603.10702, eq. 3-4.
FLUX and diffusers run the other way; the conversion is in `decoder.py`.
"""

import torch
from torch import Tensor

from unicom_dist.config.schema import CodecConfig, PriorConfig


def _spread(t: Tensor, like: Tensor) -> Tensor:
    """t [B] shaped to broadcast over the trailing axes of `like` [B, ...]."""
    return t.reshape(t.shape + (1,) * (like.dim() - t.dim()))


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t = t data + (1 - t) noise; t has the leading axes of data."""
    t = _spread(t, data).to(data.dtype)
    return t * data + (1 - t) * noise


def target(data: Tensor, noise: Tensor) -> Tensor:
    """v = data - noise."""
    return data - noise


def clean_from_velocity(z_t: Tensor, velocity: Tensor, t: Tensor) -> Tensor:
    """The data a straight path from z_t would reach: z_t + (1 - t) v."""
    return z_t + (1 - _spread(t, z_t).to(z_t.dtype)) * velocity


def shift(t: Tensor, factor: float) -> Tensor:
    """t' = 1 - s(1-t) / (1 + (s-1)(1-t)): s > 1 moves times towards noise, 0 and 1 stay."""
    sigma = 1 - t
    return 1 - factor * sigma / (1 + (factor - 1) * sigma)


def sample_t(config: CodecConfig | PriorConfig, n: int, generator: torch.Generator) -> Tensor:
    """n times in [0, 1], float32, by `config.timestep` and `config.timestep_shift`; consumes `generator` only."""
    if config.timestep == "uniform":
        t = torch.rand(n, generator=generator)
    else:
        t = torch.randn(n, generator=generator).sigmoid()
    return shift(t, config.timestep_shift)
