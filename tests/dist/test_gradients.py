"""Partial gradients, the global norm and clipping, on four gloo ranks with buffers written by hand."""

import math

import pytest
import torch

from unicom_dist.config.errors import NonFiniteError
from unicom_dist.config.layout import Layout
from unicom_dist.parallel.engine import Fragment, Piece
from unicom_dist.parallel.gradients import Finish, Run, runs
from unicom_dist.parallel.mesh import Mesh, init_mesh
from unicom_dist.testing.distributed import run_ranks

pytestmark = pytest.mark.dist
WORLD, WIDE = 4, (8, 3)


def tensor_parallel(mesh: Mesh) -> list[Fragment]:
    """A gain that every rank holds, two key-value heads for four ranks, a matrix of which each rank has a quarter."""
    rank = mesh.tp.rank
    return [
        Fragment(Piece("gain", (4,), sum_over="tp", owner=rank == 0), 0, 4, 0, 0),
        Fragment(Piece("key", WIDE, 0, rank // 2 * 4, 4, sum_over="kv", owner=rank % 2 == 0), 0, 12, 0, 4),
        Fragment(Piece("matrix", WIDE, 0, rank * 2, 2), 0, 6, 1, 0),
    ]


def pipelined(mesh: Mesh) -> list[Fragment]:
    """The embedding on the first and the last of four pp_stages, and a matrix on each."""
    layer = Fragment(Piece(f"layer.{mesh.pp.rank}", (5,)), 0, 5, 0, 0)
    if mesh.pp.rank not in (0, 3):
        return [layer]
    return [layer, Fragment(Piece("table", WIDE, sum_over="tied", owner=mesh.pp.rank == 0), 0, 24, 1, 0)]


def values(mesh: Mesh, fragments: list[Fragment]) -> list[torch.Tensor]:
    """What a rank found: its number plus one everywhere, and a hundred where no fragment lies."""
    buffers = [torch.full((30,), 100.0) for _ in range(2)]
    for f in fragments:
        buffers[f.group][f.start : f.start + f.numel] = mesh.rank + 1.0
    return buffers


def work(rank: int, world: int) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, layout, make in (("tp", Layout(tp=4), tensor_parallel), ("pp", Layout(pp=4), pipelined)):
        mesh = init_mesh(layout)
        fragments = make(mesh)
        for clip in (0.0, 1.0):
            buffers = values(mesh, fragments)
            norm = Finish(mesh, fragments, False, clip)(buffers)
            parts = {f.name: buffers[f.group][f.start : f.start + f.numel].clone() for f in fragments}
            found[name, clip] = (norm, parts)
        poisoned = values(mesh, fragments)
        if rank == 2:
            poisoned[0][0] = float("nan")
        with pytest.raises(NonFiniteError):
            Finish(mesh, fragments, False, 1.0)(poisoned)
    wrong = [Fragment(Piece("gain", (4,), sum_over="tp"), 0, 4 if rank else 3, 0, 0)]
    with pytest.raises(RuntimeError, match="gain"):
        Finish(init_mesh(Layout(tp=4)), wrong, False, 1.0)
    mesh = init_mesh(Layout(dp=2, tp=2))
    whole = [Fragment(Piece("matrix", WIDE, 0, mesh.tp.rank * 4, 4), 0, 12, 0, 0)]
    found["replicas"] = Finish(mesh, whole, True, 0.0)([torch.full((12,), mesh.tp.rank + 1.0)])
    return found


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(work, WORLD, timeout_s=120)


def test_partial_gradients_are_summed_over_the_ranks_that_hold_the_rest(ranks):
    for rank, found in enumerate(ranks):
        _, parts = found["tp", 0.0]
        assert set(parts["gain"].tolist()) == {1 + 2 + 3 + 4}
        assert set(parts["key"].tolist()) == {3 if rank < 2 else 7}
        assert set(parts["matrix"].tolist()) == {rank + 1}
        _, parts = found["pp", 0.0]
        assert set(parts[f"layer.{rank}"].tolist()) == {rank + 1}
        assert set(parts["table"].tolist()) == {1 + 4} if rank in (0, 3) else "table" not in parts


def test_the_norm_counts_every_element_of_the_model_once(ranks):
    tensor = 4 * 10**2 + 12 * (3**2 + 7**2) + 6 * (1 + 4 + 9 + 16)
    pipeline = 5 * (1 + 4 + 9 + 16) + 24 * 5**2
    for found in ranks:
        assert found["tp", 0.0][0] == pytest.approx(math.sqrt(tensor), rel=1e-6)
        assert found["pp", 0.0][0] == pytest.approx(math.sqrt(pipeline), rel=1e-6)
        assert found["replicas"] == pytest.approx(math.sqrt(12 * (1 + 4)), rel=1e-6)


def test_clipping_scales_by_the_norm(ranks):
    for found in ranks:
        for name in ("tp", "pp"):
            norm, clipped = found[name, 1.0]
            for tensor, part in clipped.items():
                torch.testing.assert_close(part, found[name, 0.0][1][tensor] / (norm + 1e-6))


def test_neighbouring_fragments_are_one_run():
    pieces = [Piece("a", (4,)), Piece("b", (2,)), Piece("c", (3,))]
    fragments = [Fragment(piece, 0, piece.numel, 0, start) for piece, start in zip(pieces, (4, 8, 11), strict=True)]
    assert runs(fragments) == [Run(0, 4, 10), Run(0, 11, 14)]
