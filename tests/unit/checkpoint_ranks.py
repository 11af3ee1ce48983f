"""Ranks of any layout in one process: what each would hold of a small model with every kind of cut, and their stores.

The model: layers of a fused q|k (k has 2 heads, copied when tp is larger), o cut across columns, a norm that every tp
rank holds; an embedding whose rows do not divide, so that the last tp rank's part is padded; its tied copy in the last
pp_stage; a frozen connector; a scalar. The values are those of `whole`, so that every layout holds the same model.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from unicom_dist.checkpoint.store import CheckpointStore
from unicom_dist.config.layout import AXES, Layout
from unicom_dist.parallel.engine import Fragment, Piece, fragments_of
from unicom_dist.parallel.mesh import Axis, Mesh

VOCABULARY, WIDTH, LAYERS, Q_ROWS, K_HEADS, HEAD_ROWS = 13, 6, 3, 16, 2, 2
KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
FROZEN = 2  # number of the group without moments
LAYOUTS = [
    Layout(),
    Layout(dp=3, zero_stage=3),
    Layout(dp=2, zero_stage=0),
    Layout(tp=2),
    Layout(tp=4, zero_stage=3),
    Layout(pp=2),
    Layout(pp=3, dp=2, zero_stage=1),
    Layout(tp=2, dp=2, zero_stage=3),
    Layout(tp=2, pp=2),
    Layout(tp=2, pp=2, dp=2, zero_stage=3),
    Layout(ulysses=2, dp=2, zero_stage=3),
    Layout(tp=8, pp=1, dp=2, zero_stage=2),
]


class LocalMesh(Mesh):
    """A rank that needs no process group to agree on a name."""

    def broadcast_object(self, value):
        return "attempt"


def mesh_of(layout: Layout, rank: int) -> LocalMesh:
    members = {axis: (axis,) for axis in AXES} | {"zero": ("dp", "ulysses"), "everyone": AXES}
    axes = {}
    for name, flattened in members.items():
        (ranks,) = (ranks for ranks in layout.groups(flattened) if rank in ranks)
        axes[name] = Axis(name, ranks.index(rank), len(ranks), None, tuple(ranks))
    return LocalMesh(rank, layout.world, torch.device("cpu"), layout, **axes)


def parameters(layout: Layout, rank: int) -> Iterator[tuple[int, list[Piece], int]]:
    """(group, pieces, padding) of every parameter of a rank's slice of the model."""
    place = layout.coordinates(rank)
    tp, at, pp = layout.tp, place["tp"], place["pp"]
    first, last = pp == 0, pp == layout.pp - 1
    rows = -(-VOCABULARY // tp)
    begin = min(at * rows, VOCABULARY)
    held = min(rows, VOCABULARY - begin)
    if first or last:
        tied = {} if first else {"owner": False, "sum_over": "tied"}
        padding = (rows - held) * WIDTH
        yield 0, [Piece("embed", (VOCABULARY, WIDTH), 0, begin, held, **tied)], padding
    for layer in range(LAYERS):
        if layer * layout.pp // LAYERS != pp:
            continue
        q = Piece(f"layers.{layer}.q", (Q_ROWS, WIDTH), 0, at * Q_ROWS // tp, Q_ROWS // tp)
        copies = max(1, tp // K_HEADS)
        k_rows = K_HEADS * HEAD_ROWS // min(tp, K_HEADS)
        k_shape = (K_HEADS * HEAD_ROWS, WIDTH)
        k = Piece(f"layers.{layer}.k", k_shape, 0, at // copies * k_rows, k_rows, "kv", at % copies == 0)
        yield 0, [q, k], 0
        yield 0, [Piece(f"layers.{layer}.o", (WIDTH, Q_ROWS), 1, at * Q_ROWS // tp, Q_ROWS // tp)], 0
        yield 1, [Piece(f"layers.{layer}.norm", (WIDTH,), sum_over="tp", owner=at == 0)], 0
    if last:
        yield 1, [Piece("scale", (), owner=at == 0)], 0
        yield FROZEN, [Piece("connector", (5, 3), owner=at == 0)], 0


def fragments(layout: Layout, rank: int) -> list[Fragment]:
    """As the engines cut: parameter by parameter in ZeRO-3, each group as one in ZeRO 1 and 2, not at all without."""
    zero = mesh_of(layout, rank).zero
    found, starts, sizes = [], [0, 0, 0], [0, 0, 0]
    listed = list(parameters(layout, rank))
    for group, pieces, padding in listed:
        sizes[group] += sum(p.numel for p in pieces) + padding
    before = [0, 0, 0]
    for group, pieces, padding in listed:
        numel = sum(p.numel for p in pieces) + padding
        if layout.zero_stage == 3:
            span = -(-numel // zero.size)
            offset = min(zero.rank * span, numel)
            share, start = min(span, numel - offset), starts[group]
            starts[group] += span
        elif layout.zero_stage and group != FROZEN:
            span = -(-sizes[group] // zero.size)
            low = max(zero.rank * span, before[group])
            high = min((zero.rank + 1) * span, before[group] + numel)
            offset, share = (low - before[group], high - low) if high > low else (0, 0)
            start = max(0, low - zero.rank * span) if share else 0
        else:
            offset, share, start = 0, numel, before[group]
            if layout.zero_stage and zero.rank:  # weights that are not split belong to the first replica
                pieces = [Piece(p.name, p.shape, p.dim, p.begin, p.length, p.sum_over, False) for p in pieces]
        before[group] += numel
        found += fragments_of(pieces, offset, share, group, start)
    return found


def whole(kind: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor of the single-process model."""
    seed = sum(number * ord(letter) for number, letter in enumerate(kind + name, 1))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state_of(layout: Layout, rank: int) -> dict[str, list[torch.Tensor]]:
    """Buffers of a rank; what no fragment covers is padding and 0."""
    found = fragments(layout, rank)
    state = {}
    for kind in KINDS:
        buffers = [torch.zeros(max((f.start + f.numel for f in found if f.group == g), default=0)) for g in range(3)]
        if kind.startswith("exp_avg"):
            buffers[FROZEN] = torch.zeros(0)
        for f in found:
            if buffers[f.group].numel():
                values = f.piece.of(whole(kind, f.name, f.piece.shape)).flatten()[f.offset : f.offset + f.numel]
                buffers[f.group][f.start : f.start + f.numel] = values
        state[kind] = buffers
    return state


def save_all(folder: Path, layout: Layout, step: int = 1, **extra: object) -> list[CheckpointStore]:
    """A checkpoint as the ranks of `layout` write it, one after the other."""
    stores = [CheckpointStore(folder, mesh_of(layout, rank), timeout_s=5) for rank in range(layout.world)]
    for rank, store in reversed(list(enumerate(stores))):
        store.save(step, state_of(layout, rank), fragments(layout, rank), dict(extra), layout.zero_stage == 0)
    for store in stores:
        store.wait()
    return stores
