"""Checkpoints of a state on a GPU: staged in page-locked memory, equal to the bit."""

from pathlib import Path

import pytest
import torch

from unicom_dist.checkpoint.saved import latest, read_state
from unicom_dist.checkpoint.store import CheckpointStore
from unicom_dist.parallel.engine import Fragment, Piece
from unicom_dist.parallel.mesh import Mesh

pytestmark = pytest.mark.gpu
SIZE = 5 << 20


def test_what_a_later_step_changes_is_saved_as_it_was(tmp_path: Path) -> None:
    fragments = [Fragment(Piece("x", (SIZE,)), 0, SIZE, 0, 0)]
    state = {kind: [torch.randn(SIZE, device="cuda")] for kind in ("weight", "ema")}
    kept = {kind: [buffer.cpu() for buffer in buffers] for kind, buffers in state.items()}
    store = CheckpointStore(tmp_path, Mesh(0, 1, torch.device("cuda", 0)))
    store.save(1, state, fragments, {}, replicated=True)
    for buffers in state.values():
        buffers[0].zero_()
    store.wait()
    assert all(area.is_pinned() for areas in store._staging.values() for area in areas)
    found = latest(tmp_path)
    assert found is not None
    got = read_state(found, fragments, kept, ("weight", "ema"))
    assert all(torch.equal(got[kind][0], kept[kind][0]) for kind in kept)
