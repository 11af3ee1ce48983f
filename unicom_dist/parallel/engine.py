"""What the training loop asks of an engine, and where each parameter's local piece lies.

An engine owns the module, the optimizer and the data-parallel reduction of one slice of the model. Its state is a few
flat float32 buffers per rank ("groups"); a `Fragment` says which part of which parameter lies where in them.
Checkpoints, EMA and resharding work on buffers and fragments alone and do not know which engine they serve.
Shapes: n_g elements of group g on this rank.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unicom_dist.config.errors import NonFiniteError
from unicom_dist.parallel.mesh import Mesh

Buffers = list[Tensor]  # one flat float32 tensor per group


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the precision of the weights used in forward and backward; master weights are always float32."""

    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    clip: float = 1.0  # largest global gradient norm; 0 = no clipping
    precision: str = "bfloat16"


@dataclass(frozen=True)
class Fragment:
    """`parameter.flatten()[offset : offset + numel]` is `buffers[group][start : start + numel]` on this rank.

    `span` elements are reserved there (numel plus padding), the same on every rank; numel may be 0.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int
    group: int
    start: int
    span: int


class Engine(Protocol):
    """Forward, backward and optimizer step of one slice of the model over its data-parallel replicas.

    `state()` holds {"weight", "exp_avg", "exp_avg_sq"}: buffers by group; the moments of frozen groups are empty.
    `replicated`: every rank holds everything (then only dp_rank 0 needs to save it).
    """

    module: nn.Module
    mesh: Mesh
    fragments: list[Fragment]
    replicated: bool
    steps_done: int

    def __call__(self, batch: Any) -> Any: ...

    def accumulate(self) -> AbstractContextManager[None]:
        """Around all forwards and backwards of one step; gradients are reduced once, at its end. Collective over dp."""

    def backward(self, loss: Tensor) -> None:
        """Add gradients of a scalar loss; the engine averages over dp."""

    def step(self, lr: float) -> float:
        """Clip and apply AdamW; the global gradient norm before clipping. Collective over dp.

        NonFiniteError, on every rank and before any weight changes, when the norm is not finite.
        """

    def state(self) -> dict[str, Buffers]:
        """The live buffers (not copies)."""

    def load_state(self, state: dict[str, Buffers], steps_done: int) -> None:
        """Copy buffers in and refresh the weights of the forward pass. Missing moments become 0. Collective over dp."""

    def full(self, buffers: Buffers, dtype: torch.dtype) -> dict[str, Tensor]:
        """Whole parameters on the CPU, from buffers laid out as the weights (weights or EMA). Collective over dp."""

    def close(self) -> None:
        """Release hooks and buffers."""


def decay_groups(module: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
    """[matrices, vectors and scalars, frozen]: only matrices are decayed; any list may be empty."""
    named = list(module.named_parameters())
    trained = [(name, p) for name, p in named if p.requires_grad]
    return [
        [(name, p) for name, p in trained if p.ndim >= 2],
        [(name, p) for name, p in trained if p.ndim < 2],
        [(name, p) for name, p in named if not p.requires_grad],
    ]


def check_finite(norm: float) -> None:
    """NonFiniteError unless `norm` is finite."""
    if not math.isfinite(norm):
        raise NonFiniteError(
            f"gradient norm = {norm}",
            "loss or gradients overflowed; the weights were not touched by this step",
            "lower lr, raise warmup or set precision: float32; the samples are named in nonfinite-rank-*.json",
            "docs/training.md",
        )


def whole_parameters(
    gathered: list[Tensor], fragments: list[Fragment], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """(name, parameter) from the buffers of all ranks. gathered: per group [ranks, n_g]."""
    for f in fragments:
        pieces = gathered[f.group][:, f.start : f.start + f.span]
        yield f.name, pieces.reshape(-1)[: math.prod(f.shape)].reshape(f.shape).to("cpu", dtype, copy=True)
