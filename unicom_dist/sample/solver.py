"""Ordinary differential equation solvers for dz/dt = v(z, t), from noise (t = 0) to data (t = 1).

The state is float32 whatever precision the network runs in. Times are explicit, so that what was drawn can be drawn
again elsewhere. Noise comes from a sample's own seed, on the CPU: a picture depends on its prompt and seed, not on the
batch it was drawn in.
No solver looks at t = 1, where the network was hardly trained and the clean-prediction form of v is singular.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from unicom_dist.config.errors import ConfigError

Solver = Literal["euler", "heun", "dpm"]
Velocity = Callable[[Tensor, float], Tensor]


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """`steps + 1` times from 0 to 1: even in u = i / steps, moved by t = 1 - s (1 - u) / (1 + (s - 1)(1 - u)).

    s > 1 spends more of the steps near the noise; s = 1 leaves them even. N = 4, s = 3 gives 0, .1, .25, .5, 1:
    FLUX's schedule read in our direction. ValueError unless steps >= 1 and shift > 0.
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"a time grid needs steps >= 1 and shift > 0, got steps = {steps}, shift = {shift}")
    noise_levels = [1 - i / steps for i in range(1, steps)]
    return [0.0, *(1 - shift * level / (1 + (shift - 1) * level) for level in noise_levels), 1.0]


def checked_times(times: Sequence[float]) -> list[float]:
    """Times given one by one. ConfigError unless they rise from 0 to 1."""
    if len(times) < 2 or times[0] != 0 or times[-1] != 1 or any(a >= b for a, b in itertools.pairwise(times)):
        raise ConfigError(
            f"times {', '.join(f'{t:g}' for t in times) or 'of no number'}",
            "they must rise from 0 (noise) to 1 (data); a schedule of noise levels sigma is 1 - sigma here",
            "for example 0, 0.1, 0.25, 0.5, 1",
            "docs/sampling.md",
        )
    return list(times)


def integrate(velocity: Velocity, noise: Tensor, times: Sequence[float], solver: Solver = "euler") -> Tensor:
    """The state at times[-1] when it starts as `noise` at times[0].

    `velocity(z, t)` gets the float32 state and one time for all of it, and returns a tensor of z's shape.
    euler: one call a step, error O(h). heun: two calls a step except in the last, an Euler step; error O(h^2).
    dpm: DPM-Solver++(2M), one call a step; see `multistep`.
    Returns: float32, the shape of `noise`.
    """
    if solver == "dpm":
        return multistep(velocity, noise, times)
    z = noise.float()
    last = len(times) - 2
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        step = t_next - t
        v = velocity(z, t).float()
        if solver == "heun" and i < last:
            v = (v + velocity(z + step * v, t_next).float()) / 2
        z = z + step * v
    return z


def multistep(velocity: Velocity, noise: Tensor, times: Sequence[float]) -> Tensor:
    """DPM-Solver++(2M) of a flow z_t = t x + (1 - t) e (Lu et al., arXiv 2211.01095, algorithm 2).

    A step of first order is Euler's. The second order adds how the predicted data x = z + (1 - t) v changed since the
    step before, in terms of lambda = log(t / (1 - t)):
        z' = z + (t' - t) v + (t' - t) / (1 - t) (x - x_before) (lambda' - lambda) / (2 (lambda - lambda_before))
    lambda is infinite at both ends: the first two steps and the last one are of first order.
    """
    z = noise.float()
    before: Tensor | None = None
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        v = velocity(z, t).float()
        x = z + (1 - t) * v
        change: Tensor | float = 0.0
        if before is not None and times[i - 1] > 0 and t_next < 1:
            ratio = (_log_snr(t_next) - _log_snr(t)) / (_log_snr(t) - _log_snr(times[i - 1]))
            change = (t_next - t) / (1 - t) * ratio / 2 * (x - before)
        z = z + (t_next - t) * v + change
        before = x
    return z


def _log_snr(t: float) -> float:
    return math.log(t / (1 - t))


def noise_from_seeds(seeds: Sequence[int], shape: Sequence[int], stream: str) -> Tensor:
    """Standard normal noise, one independent draw of `shape` per seed.

    `stream` separates the two flows of a picture ("prior", "decoder"): they share a seed but not their noise.
    Returns: [len(seeds), *shape] float32 on the CPU.
    """
    return torch.stack([torch.randn(*shape, generator=seeded(seed, stream)) for seed in seeds])


def seeded(seed: int, stream: str) -> torch.Generator:
    """A CPU generator of its own for one purpose (`stream`) of one sample."""
    key = hashlib.sha256(f"{stream}/{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
