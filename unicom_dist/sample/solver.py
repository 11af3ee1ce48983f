"""Ordinary differential equation solvers for dz/dt = v(z, t), from noise (t = 0) to data (t = 1).

The state is float32 whatever precision the network runs in. Times are explicit, so that what was drawn can be drawn
again elsewhere. Noise comes from a sample's own seed, on the CPU: a picture depends on its prompt and seed, not on the
batch it was drawn in.
Neither solver looks at t = 1, where the network was hardly trained and the clean-prediction form of v is singular.
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Solver = Literal["euler", "heun"]
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


def integrate(velocity: Velocity, noise: Tensor, times: Sequence[float], solver: Solver = "euler") -> Tensor:
    """The state at times[-1] when it starts as `noise` at times[0].

    `velocity(z, t)` gets the float32 state and one time for all of it, and returns a tensor of z's shape.
    Euler: one call a step, error O(h). Heun: two calls a step except in the last, an Euler step; error O(h^2).
    Returns: float32, the shape of `noise`.
    """
    z = noise.float()
    last = len(times) - 2
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        step = t_next - t
        v = velocity(z, t).float()
        if solver == "heun" and i < last:
            v = (v + velocity(z + step * v, t_next).float()) / 2
        z = z + step * v
    return z


def noise_from_seeds(seeds: Sequence[int], shape: Sequence[int], stream: str) -> Tensor:
    """Standard normal noise, one independent draw of `shape` per seed.

    `stream` separates the two flows of a picture ("prior", "decoder"): they share a seed but not their noise.
    Returns: [len(seeds), *shape] float32 on the CPU.
    """
    return torch.stack([_draw(seed, shape, stream) for seed in seeds])


def _draw(seed: int, shape: Sequence[int], stream: str) -> Tensor:
    key = hashlib.sha256(f"{stream}/{seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") >> 1)
    return torch.randn(*shape, generator=generator)
