"""Checkpoint files and folders: whole or absent, readable under another dp size, clear when something is wrong."""

import errno
import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unicom_dist.checkpoint import store as stores
from unicom_dist.checkpoint.store import CheckpointStore, checkpoints, latest, read_extra, read_rng, read_state
from unicom_dist.checkpoint.tensorfile import TensorFile, write_tensors
from unicom_dist.checkpoint.weights import export_weights, read_weights, read_weights_config
from unicom_dist.config.errors import CheckpointError
from unicom_dist.parallel.engine import Fragment, Piece
from unicom_dist.parallel.mesh import Mesh

SHAPES = {"a": (3, 5), "b": (7,), "c": (1,)}
CPU = torch.device("cpu")


class LocalMesh(Mesh):
    """A rank that needs no process group to agree on a name."""

    def broadcast_object(self, value):
        return "attempt"


def layout(rank: int, world: int) -> list[Fragment]:
    """Every parameter cut into `world` padded pieces, "a" in group 0 and the others in group 1."""
    fragments, starts = [], [0, 0]
    for name, shape in SHAPES.items():
        whole, group = torch.Size(shape).numel(), 0 if name == "a" else 1
        span = -(-whole // world)
        offset = min(rank * span, whole)
        fragments.append(Fragment(Piece(name, shape), offset, min(span, whole - offset), group, starts[group]))
        starts[group] += span
    return fragments


def whole(kind: str, name: str) -> torch.Tensor:
    seed = sum(map(ord, kind + name))
    return torch.randn(torch.Size(SHAPES[name]).numel(), generator=torch.Generator().manual_seed(seed))


def state_of(rank: int, world: int) -> dict[str, list[torch.Tensor]]:
    """Buffers of a rank; group 1 is frozen, so it has no moments."""
    fragments = layout(rank, world)
    state = {}
    for kind in ("weight", "exp_avg"):
        buffers = [torch.zeros(sum(f.numel + 1 for f in fragments if f.group == group)) for group in (0, 1)]
        for f in fragments:
            buffers[f.group][f.start : f.start + f.numel] = whole(kind, f.name)[f.offset : f.offset + f.numel]
        state[kind] = [buffers[0], torch.zeros(0)] if kind == "exp_avg" else buffers
    return state


def save_all(folder: Path, world: int, step: int, **extra: object) -> list[CheckpointStore]:
    """A checkpoint as `world` ranks write it, one after the other."""
    stores_ = [CheckpointStore(folder, LocalMesh(rank, world, CPU), timeout_s=5) for rank in range(world)]
    for rank, store in reversed(list(enumerate(stores_))):
        store.save(step, state_of(rank, world), layout(rank, world), dict(extra), replicated=False)
    for store in stores_:
        store.wait()
    return stores_


@pytest.mark.parametrize(("written", "read"), [(1, 1), (2, 2), (1, 3), (3, 2), (2, 1), (4, 3)])
def test_every_layout_reads_every_other_bit_for_bit(tmp_path, written, read):
    save_all(tmp_path, written, 7, loader={"step": 7})
    found = latest(tmp_path)
    assert read_extra(found)["loader"] == {"step": 7}
    for rank in range(read):
        expected = state_of(rank, read)
        got = read_state(found, layout(rank, read), expected, ("weight", "exp_avg"))
        for kind, buffers in expected.items():
            assert all(torch.equal(a, b) for a, b in zip(buffers, got[kind], strict=True)), (rank, kind)


def test_a_file_is_ordinary_safetensors(tmp_path):
    tensors = {"x": torch.randn(3, 4), "empty": torch.zeros(0), "bytes": torch.arange(5, dtype=torch.uint8)}
    tensors["half"] = torch.randn(6).bfloat16()
    size = write_tensors(tmp_path / "f.safetensors", tensors, {"note": "hello"})
    assert size == (tmp_path / "f.safetensors").stat().st_size
    loaded = load_file(tmp_path / "f.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert TensorFile(tmp_path / "f.safetensors").metadata == {"note": "hello"}


def test_training_goes_on_while_the_file_is_written(tmp_path, monkeypatch):
    allowed = threading.Event()
    slow = stores.write_tensors
    monkeypatch.setattr(stores, "write_tensors", lambda *args: (allowed.wait(10), slow(*args)))
    store = CheckpointStore(tmp_path, LocalMesh(0, 1, CPU))
    state = state_of(0, 1)
    kept = {kind: [b.clone() for b in buffers] for kind, buffers in state.items()}
    store.save(1, state, layout(0, 1), {}, replicated=True)
    for buffers in state.values():
        for buffer in buffers:
            buffer.zero_()  # the next step changes the weights while the thread still writes
    assert latest(tmp_path) is None
    allowed.set()
    store.wait()
    got = read_state(latest(tmp_path), layout(0, 1), kept, ("weight", "exp_avg"))
    assert torch.equal(got["weight"][0], kept["weight"][0])


def test_a_full_disk_is_said_and_the_checkpoint_before_it_stays(tmp_path, monkeypatch):
    (store,) = save_all(tmp_path, 1, 1)

    def full(path, *args):
        path.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stores, "write_tensors", full)
    store.save(2, state_of(0, 1), layout(0, 1), {}, replicated=True)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        store.wait()
    assert "kept" in caught.value.why
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000001"]
    assert not list(tmp_path.glob(".step-*"))


def test_a_checkpoint_that_cannot_fit_is_refused_before_a_byte_is_written(tmp_path, monkeypatch):
    (store,) = save_all(tmp_path, 1, 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(CheckpointError, match="does not fit"):
        store.save(2, state_of(0, 1), layout(0, 1), {}, replicated=True)


def test_a_rank_that_never_finishes_leaves_no_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, LocalMesh(0, 2, CPU), timeout_s=0.2)
    store.save(3, state_of(0, 2), layout(0, 2), {}, replicated=False)
    with pytest.raises(CheckpointError, match=r"rank-00001-of-00002\.safetensors after"):
        store.wait()
    assert latest(tmp_path) is None


def test_leftovers_of_a_killed_writer_are_removed_at_the_next_start(tmp_path):
    (tmp_path / ".step-000009.dead").mkdir(parents=True)
    CheckpointStore(tmp_path, LocalMesh(0, 1, CPU))
    assert not list(tmp_path.glob(".step-*"))


def test_another_model_is_named_by_its_first_difference(tmp_path):
    save_all(tmp_path, 1, 1)
    other = [
        Fragment(Piece("b", (9,)) if f.name == "b" else f.piece, 0, f.numel, f.group, f.start) for f in layout(0, 1)
    ]
    with pytest.raises(CheckpointError, match=r"b: \[7\] saved, \[9\] configured"):
        read_state(latest(tmp_path), other, state_of(0, 1), ("weight",))


def test_a_foreign_folder_is_refused(tmp_path):
    save_all(tmp_path, 1, 1)
    state = latest(tmp_path) / "state.json"
    state.write_text(json.dumps({"format": 99, "step": 1, "dp": 1, "shapes": {}}))
    with pytest.raises(CheckpointError, match="cannot be used") as caught:
        read_extra(latest(tmp_path))
    assert "format 99" in caught.value.why


def test_the_random_state_returns_on_the_same_number_of_ranks_only(tmp_path):
    torch.manual_seed(5)
    save_all(tmp_path, 1, 1)
    expected = torch.rand(3)
    torch.set_rng_state(read_rng(latest(tmp_path), Mesh(0, 1, CPU)))
    assert torch.equal(torch.rand(3), expected)
    assert read_rng(latest(tmp_path), Mesh(0, 2, CPU)) is None


def test_exported_weights_come_back_and_are_replaced_as_a_whole(tmp_path):
    export_weights(
        tmp_path / "w", {"step": 1}, {"x": torch.ones(2), "n": torch.arange(3)}, lambda p: (p / "more").touch()
    )
    export_weights(tmp_path / "w", {"step": 2}, {"x": torch.zeros(2)})
    config, tensors = read_weights(tmp_path / "w")
    assert config == {"step": 2}
    assert tensors.keys() == {"x"}
    assert tensors["x"].dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["w"]
    with pytest.raises(CheckpointError, match="no exported weights"):
        read_weights_config(tmp_path / "nothing")
