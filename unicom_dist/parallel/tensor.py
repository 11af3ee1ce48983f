"""Tensor parallelism applied to a module that was written for one process: declarations in, this rank's shard out.

A declaration names modules by pattern ("backbone.model.layers.*.mlp") and says how the ranks of tp share them; `shard`
puts Megatron's layers in their place and records in every parameter (attribute `pieces`) which parts of which tensors
of the whole model it holds. It is meant for a module on the meta device, where a model of any size costs nothing;
`materialise` then gives memory to what the rank holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Protocol

import torch
from torch import Tensor, nn

from unicom_dist.parallel.cross_entropy import VocabShard
from unicom_dist.parallel.engine import Piece
from unicom_dist.parallel.megatron import ColumnParallel, RowParallel, vocab_embedding
from unicom_dist.parallel.mesh import Axis, Mesh


class Declaration(Protocol):
    """How the ranks of tp share the modules whose names match `pattern`."""

    @property
    def pattern(self) -> str: ...

    def apply(self, root: nn.Module, name: str, mesh: Mesh) -> None:
        """Shard the module `name` of `root` in place and set the pieces of its parameters."""


@dataclass(frozen=True)
class Column:
    """Linear layers that read the same input become one, `fused`; each rank computes some outputs of every one.

    linears: the attribute of each, and into how many units (heads) its outputs divide; units are not cut, and copied
    where there are fewer than ranks. `becomes`: the module's class from then on, which calls the fused layer.
    """

    pattern: str
    linears: tuple[tuple[str, int], ...]
    fused: str
    becomes: type[nn.Module]

    def apply(self, root: nn.Module, name: str, mesh: Mesh) -> None:
        """See `Declaration`."""
        module, inputs = root.get_submodule(name), 0
        weights, biases = [], []
        for attribute, units in self.linears:
            linear = module.get_submodule(attribute)
            assert isinstance(linear, nn.Linear)
            inputs = linear.in_features
            cut = _dealt(f"{name}.{attribute}.weight", linear.weight, units, mesh.tp)
            weights.append(cut)
            if linear.bias is not None:
                biases.append(replace(cut, name=f"{name}.{attribute}.bias", shape=tuple(linear.bias.shape)))
            delattr(module, attribute)
        fused = ColumnParallel(inputs, [piece.length for piece in weights], bool(biases), mesh)
        fused.layer.weight.pieces = weights
        if biases:
            fused.layer.bias.pieces = biases
        module.add_module(self.fused, fused)
        module.__class__ = self.becomes


@dataclass(frozen=True)
class Row:
    """A linear layer without bias: each rank takes some inputs, and their outputs are summed."""

    pattern: str

    def apply(self, root: nn.Module, name: str, mesh: Mesh) -> None:
        """See `Declaration`."""
        linear = root.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        length = linear.in_features // mesh.tp.size
        row = RowParallel(linear.in_features, linear.out_features, mesh)
        piece = Piece(f"{name}.weight", tuple(linear.weight.shape), 1, mesh.tp.rank * length, length)
        row.layer.weight.pieces = [piece]
        root.set_submodule(name, row)


@dataclass(frozen=True)
class Vocabulary:
    """An embedding: each rank has equally many rows, the last of them padding where they do not divide."""

    pattern: str

    def apply(self, root: nn.Module, name: str, mesh: Mesh) -> None:
        """See `Declaration`."""
        table = root.get_submodule(name)
        assert isinstance(table, nn.Embedding)
        piece = _rows(f"{name}.weight", table.weight, mesh.tp)
        rows = -(-table.num_embeddings // mesh.tp.size)
        embedding = vocab_embedding(rows * mesh.tp.size, table.embedding_dim, mesh)
        embedding.weight.pieces = [piece]  # type: ignore[union-attr]
        root.set_submodule(name, embedding)


@dataclass(frozen=True)
class VocabularyHead:
    """A module with a `weight` of a row per token and a `shard` that says which rows it has, dealt as `Vocabulary`."""

    pattern: str

    def apply(self, root: nn.Module, name: str, mesh: Mesh) -> None:
        """See `Declaration`."""
        head = root.get_submodule(name)
        whole = head.get_parameter("weight")
        here = nn.Parameter(whole.new_empty(-(-whole.shape[0] // mesh.tp.size), whole.shape[1]))
        here.pieces = [_rows(f"{name}.weight", whole, mesh.tp)]  # type: ignore[attr-defined]
        head.weight, head.shard = here, VocabShard(mesh.tp, whole.shape[0])  # type: ignore[assignment]


@dataclass(frozen=True)
class Positionwise:
    """Held whole by every rank; under sequence parallelism applied to the rank's own positions alone.

    Then each rank has a part of the gradient.
    """

    pattern: str

    def apply(self, root: nn.Module, name: str, mesh: Mesh) -> None:
        """See `Declaration`."""
        partial = "tp" if mesh.layout.sequence_parallel else ""
        for leaf, parameter in root.get_submodule(name).named_parameters():
            piece = Piece(f"{name}.{leaf}", tuple(parameter.shape), sum_over=partial, owner=mesh.tp.rank == 0)
            parameter.pieces = [piece]  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Headwise:
    """Held whole by every rank, and applied to the rank's own heads alone: each rank has a part of the gradient."""

    pattern: str

    def apply(self, root: nn.Module, name: str, mesh: Mesh) -> None:
        """See `Declaration`."""
        for leaf, parameter in root.get_submodule(name).named_parameters():
            piece = Piece(f"{name}.{leaf}", tuple(parameter.shape), sum_over="tp", owner=mesh.tp.rank == 0)
            parameter.pieces = [piece]  # type: ignore[attr-defined]


def shard(root: nn.Module, declarations: Sequence[Declaration], mesh: Mesh) -> None:
    """Turn `root` into this rank's shard, in place. Parameters that were tied stay tied.

    What no declaration names is held whole by every rank, which all compute the same with it.
    """
    if mesh.tp.size == 1:
        return
    tied: dict[nn.Parameter, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        tied.setdefault(parameter, []).append(name)
    for name in [name for name, _ in root.named_modules()]:
        for declaration in declarations:
            if fnmatchcase(name, declaration.pattern):
                declaration.apply(root, name, mesh)
    for first, *others in tied.values():
        for other in others:
            _assign(root, other, root.get_parameter(first))
    for name, parameter in root.named_parameters():
        if not hasattr(parameter, "pieces"):
            parameter.pieces = [Piece(name, tuple(parameter.shape), owner=mesh.tp.rank == 0)]  # type: ignore[attr-defined]


@torch.no_grad()
def materialise(root: nn.Module, device: torch.device | str = "cpu") -> None:
    """Memory for every parameter, its values not set; ties and pieces are kept."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in list(root.named_parameters(remove_duplicate=False)):
        if parameter not in made:
            made[parameter] = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
            vars(made[parameter]).update(vars(parameter))
        _assign(root, name, made[parameter])


def _assign(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(module), leaf, parameter)


def _dealt(name: str, weight: Tensor, units: int, tp: Axis) -> Piece:
    """The rows of a rank's units: equally many each, or one that several ranks have in common."""
    copies, each = max(1, tp.size // units), max(1, units // tp.size)
    rows = weight.shape[0] // units
    first = tp.rank // copies * each
    return Piece(
        name,
        tuple(weight.shape),
        begin=first * rows,
        length=each * rows,
        sum_over="kv" if copies > 1 else "",
        owner=tp.rank % copies == 0,
    )


def _rows(name: str, table: Tensor, tp: Axis) -> Piece:
    """The real ones among a rank's rows of a vocabulary."""
    total, each = table.shape[0], -(-table.shape[0] // tp.size)
    begin = min(tp.rank * each, total)
    return Piece(name, tuple(table.shape), begin=begin, length=min(each, total - begin))
