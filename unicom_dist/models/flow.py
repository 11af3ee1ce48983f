"""Rectified flow: the path, its target, and how times are drawn.

Time: t = 1 is data. z_t = t z1 + (1 - t) eps and v = dz_t/dt = z1 - eps. Ref: UniCom arXiv 2603.10702, eq. 3-4.
FLUX and diffusers run the other way; the conversion is in `decoder.py`.
"""

import math

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


def linear_velocity(z_t: Tensor, t: Tensor) -> Tensor:
    """The best velocity linear in z_t, for data of mean 0 and variance 1: (2t - 1) / n z_t with n = t^2 + (1-t)^2."""
    t = _spread(t, z_t).to(z_t.dtype)
    return (2 * t - 1) / (t.square() + (1 - t).square()) * z_t


def preconditioned_velocity(output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """EDM's preconditioning on this path: the network is asked for what the linear guess leaves, at variance 1.

    v = linear_velocity + output / sqrt(n). At t = 0 the output is the data, at t = 1 the negative noise: a network too
    narrow to pass all of z_t through need not. Ref: Karras et al. 2022, arXiv 2206.00364, eq. 7, with sigma_data = 1.
    """
    share = _spread(t, z_t).to(z_t.dtype)
    return linear_velocity(z_t, t) + output / (share.square() + (1 - share).square()).sqrt()


def shift(t: Tensor, factor: float) -> Tensor:
    """t' = 1 - s(1-t) / (1 + (s-1)(1-t)): s > 1 moves times towards noise, 0 and 1 stay."""
    sigma = 1 - t
    return 1 - factor * sigma / (1 + (factor - 1) * sigma)


def flux_shift(patches: int) -> float:
    """FLUX's shift for pictures of so many patches: exp(mu), mu linear from (256, 0.5) to (4096, 1.15) and beyond."""
    return math.exp(0.5 + (patches - 256) * (1.15 - 0.5) / (4096 - 256))


def rae_shift(values: int) -> float:
    """RAE's shift for so many latent values, tokens x channels: sqrt(values / 4096) (arXiv 2510.11690)."""
    return math.sqrt(values / 4096)


def shift_factor(config: CodecConfig | PriorConfig, size: int = 0) -> float:
    """The shift that `config` asks for, in training as in drawing. `size`: a codec's patches, a prior's latent values.

    ValueError: it matters and was not given.
    """
    if not config.resolution_shift:
        return config.timestep_shift
    if size < 1:
        raise ValueError("resolution_shift needs the size of the image")
    return rae_shift(size) if isinstance(config, PriorConfig) else flux_shift(size)


def sample_t(config: CodecConfig | PriorConfig, n: int, generator: torch.Generator, size: int = 0) -> Tensor:
    """n times in [0, 1], float32, by `config.timestep` and `shift_factor`; consumes `generator` only."""
    if config.timestep == "uniform":
        t = torch.rand(n, generator=generator)
    else:
        t = torch.randn(n, generator=generator).sigmoid()
    return shift(t, shift_factor(config, size))
