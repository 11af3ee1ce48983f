"""What the training loop asks of an engine, and where each parameter's local piece lies.

An engine owns the module, the optimizer and the data-parallel reduction of one slice of the model. Its state is a few
flat float32 buffers per rank ("groups"); a `Fragment` says which part of which parameter lies where in them.
Checkpoints, EMA and resharding work on buffers and fragments alone and do not know which engine they serve.
Shapes: n_g elements of group g on this rank.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from unicom_dist.config.errors import NonFiniteError
from unicom_dist.parallel.kernels import Kernels
from unicom_dist.parallel.mesh import Mesh
from unicom_dist.parallel.precision import dtype_of

Buffers = list[Tensor]  # one flat float32 tensor per group
Root = Tensor | GradientEdge  # a tensor, or the place in the graph where it arose
Gradients = Tensor | Sequence[Tensor | None] | None


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the precision of the weights used in forward and backward; master weights are always float32."""

    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    clip: float = 1.0  # largest global gradient norm; 0 = no clipping
    precision: str = "bfloat16"
    kernels: Kernels = field(default_factory=Kernels)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights in forward and backward."""
        return dtype_of(self.precision)


@dataclass(frozen=True)
class Piece:
    """What a local parameter holds of one named tensor of the whole model: `whole.narrow(dim, begin, length)`.

    A parameter is the flattened pieces one after the other (several when matrices are fused). Names and shapes are
    those of the single-process model. `sum_over`: the gradient is partial and is summed over these ranks: "tp" (norms
    between sequence-parallel positions), "kv" (copies of a key-value head) or "tied" (the pipeline's two copies of a
    tied embedding). `owner`: one rank of those that hold the same values: the gradient norm counts it, checkpoints
    keep it.
    """

    name: str
    shape: tuple[int, ...]
    dim: int = 0
    begin: int = 0
    length: int = -1  # -1: all of `dim`
    sum_over: str = ""
    owner: bool = True

    @property
    def cut(self) -> tuple[int, ...]:
        """Shape of the part held here."""
        if not self.shape:
            return ()
        length = self.shape[self.dim] if self.length < 0 else self.length
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])

    @property
    def numel(self) -> int:
        """Elements held here."""
        return math.prod(self.cut)

    def of(self, whole: Tensor) -> Tensor:
        """The part of `whole` held here (a view)."""
        return whole.narrow(self.dim, self.begin, self.cut[self.dim]) if self.shape else whole


def pieces_of(name: str, parameter: nn.Parameter, shape: tuple[int, ...]) -> list[Piece]:
    """The pieces of a parameter: those that sharding declared (attribute `pieces`), else the whole tensor."""
    return getattr(parameter, "pieces", None) or [Piece(name, shape)]


@dataclass(frozen=True)
class Fragment:
    """`piece.of(whole).flatten()[offset : offset + numel]` is `buffers[group][start : start + numel]` on this rank."""

    piece: Piece
    offset: int
    numel: int
    group: int
    start: int

    @property
    def name(self) -> str:
        """Of the tensor in the whole model."""
        return self.piece.name


def fragments_of(pieces: list[Piece], offset: int, numel: int, group: int, start: int) -> list[Fragment]:
    """Fragments of a parameter of which elements [offset, offset + numel) lie at `start` of a group's buffer here.

    One per piece, also where it is empty: every rank knows every tensor of its slice of the model.
    """
    found, before = [], 0
    for piece in pieces:
        low = min(max(offset - before, 0), piece.numel)
        high = min(max(offset + numel - before, 0), piece.numel)
        found.append(Fragment(piece, low, high - low, group, start + max(before - offset, 0) if high > low else start))
        before += piece.numel
    return found


class Engine(Protocol):
    """Forward, backward and optimizer step of this rank's slice of the model over its replicas (`mesh.zero`).

    `state()` holds {"weight", "exp_avg", "exp_avg_sq"}: buffers by group; the moments of frozen groups are empty.
    `replicated`: every rank holds everything (then only dp_rank 0 needs to save it).
    """

    module: nn.Module
    mesh: Mesh
    fragments: list[Fragment]
    replicated: bool
    steps_done: int

    def __call__(self, batch: Any, x: Tensor | None = None, chunk: int = 0) -> Any:
        """The module's forward pass; `x` and `chunk` as the pipeline gives them."""

    def accumulate(self) -> AbstractContextManager[None]:
        """Around all forwards and backwards of one step; gradients are reduced once, at its end. Collective over dp."""

    def backward(self, roots: Root | Sequence[Root], gradients: Gradients = None) -> None:
        """As `torch.autograd.backward`: of scalar losses, or of an inner pp_stage's outputs with their `gradients`.

        Gradients of the weights add up; the engine averages them over `mesh.zero`.
        """

    def step(self, lr: float) -> float:
        """Clip and apply AdamW; the global gradient norm before clipping. Collective over dp.

        NonFiniteError, on every rank and before any weight changes, when the norm is not finite.
        """

    def state(self) -> dict[str, Buffers]:
        """The live buffers (not copies)."""

    def load_state(self, state: dict[str, Buffers], steps_done: int) -> None:
        """Copy buffers in and refresh the weights of the forward pass. Missing moments become 0. Collective over dp."""

    def gradients(self) -> Buffers:
        """Float32 gradients, averaged over `mesh.zero`, laid out as the weights (empty for frozen groups).

        Valid between the end of `accumulate` and `step`.
        """

    def using(self, buffers: Buffers) -> AbstractContextManager[None]:
        """Within the block, forward passes see these weights (an average) instead of the master weights. Collective."""

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
            "lower lr, raise warmup or set precision: float32",
            "docs/training.md",
        )


def whole_tensors(
    mesh: Mesh, buffers: Buffers, fragments: list[Fragment], replicated: bool, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor of the whole model) on the CPU, one after the other, on rank 0; other ranks only take part.

    Memory: one tensor. `replicated`: every rank of `mesh.zero` holds the same. Collective over the world: every rank
    exhausts the iterator.
    """
    mine = [f for f in fragments if f.piece.owner and f.numel and not (replicated and mesh.zero.rank)]
    lists = [mine] * mesh.world
    if mesh.world > 1:
        dist.all_gather_object(lists, mine)
    owned: dict[str, list[tuple[int, Fragment]]] = {}
    for rank, found in enumerate(lists):
        for f in found:
            owned.setdefault(f.name, []).append((rank, f))
    for name, places in owned.items():
        whole = torch.empty(places[0][1].piece.shape) if mesh.rank == 0 else torch.empty(0)
        for rank, f in places:
            if mesh.rank not in (0, rank):
                continue
            values = buffers[f.group][f.start : f.start + f.numel] if mesh.rank == rank else torch.empty(f.numel)
            if rank and mesh.rank == rank:
                dist.send(values.cpu(), 0)
            elif rank:
                dist.recv(values, rank)
            if mesh.rank == 0:
                put(f, values.cpu(), whole)
        if mesh.rank == 0:
            yield name, whole.to(dtype)


def put(fragment: Fragment, values: Tensor, whole: Tensor) -> None:
    """Write the fragment's values [numel] to their place in the tensor of the whole model."""
    part = fragment.piece.of(whole)
    if part.is_contiguous():
        part.view(-1)[fragment.offset : fragment.offset + fragment.numel] = values
        return
    width = math.prod(part.shape[1:])  # a cut across columns: whole rows lie apart
    index = torch.arange(fragment.offset, fragment.offset + fragment.numel)
    part[index // width, index % width] = values
