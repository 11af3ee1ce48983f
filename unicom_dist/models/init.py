"""Initial weights as a function of (seed, parameter name), so that they do not depend on rank, layout or order.

A `Source` gives the values of a piece of a named tensor: drawn here, or read from a file (`published.py`). A rank that
holds a cut of a matrix draws the whole, one tensor at a time, and keeps its cut.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from unicom_dist.parallel.engine import Piece, pieces_of

Source = Callable[[Piece], Tensor]  # values of shape `piece.cut`


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that belongs to (seed, name)."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def draw(name: str, shape: tuple[int, ...], seed: int, std: float = 0.0) -> Tensor:
    """A matrix, float32. `std` > 0: normal of that deviation; `std` = 0: uniform within 1/sqrt(fan in)."""
    generator = generator_for(seed, name)
    if std:
        return torch.randn(shape, generator=generator) * std
    bound: float = math.prod(shape[1:]) ** -0.5
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound


def initial(piece: Piece, seed: int, std: float = 0.0) -> Tensor:
    """The piece of a new model: matrices as `draw` makes them, biases 0 and gains 1."""
    if len(piece.shape) < 2:
        return torch.zeros(piece.cut) if piece.name.endswith("bias") else torch.ones(piece.cut)
    return piece.of(draw(piece.name, piece.shape, seed, std))


def local_values(name: str, parameter: nn.Parameter, source: Source) -> Tensor:
    """What `parameter`, called `name` in the whole model, starts as: its pieces one after the other, padding 0."""
    values = torch.zeros(parameter.shape)
    flat, start = values.view(-1), 0
    for piece in pieces_of(name, parameter, tuple(parameter.shape)):
        flat[start : start + piece.numel].view(piece.cut).copy_(source(piece))
        start += piece.numel
    return values


@torch.no_grad()
def fill(module: nn.Module, source: Source, prefix: str = "") -> None:
    """Set every parameter from `source`. `prefix` is the name of `module` in the whole model. Skips the meta device."""
    for name, parameter in module.named_parameters():
        if not parameter.is_meta:
            parameter.copy_(local_values(prefix + name, parameter, source))


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Draw every matrix of `module` anew; vectors keep what their module gave them, but biases become zero."""
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            continue
        if parameter.dim() >= 2:
            parameter.copy_(draw(name, tuple(parameter.shape), seed))
        elif name.endswith("bias"):
            parameter.zero_()
