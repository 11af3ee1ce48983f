"""Checkpoint files and folders: whole or absent, readable under every layout, clear when something is wrong."""

import errno
import json
import os
import signal
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoint_ranks import KINDS, LAYOUTS, VOCABULARY, fragments, mesh_of, save_all, state_of, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from unicom_dist.checkpoint import store as stores
from unicom_dist.checkpoint.overlap import shared
from unicom_dist.checkpoint.saved import (
    Checkpoint,
    check_model,
    checkpoints,
    latest,
    read_extra,
    read_rng,
    read_state,
)
from unicom_dist.checkpoint.store import CheckpointStore
from unicom_dist.checkpoint.tensorfile import TensorFile, write_tensors
from unicom_dist.checkpoint.weights import export_weights, read_weights, read_weights_config
from unicom_dist.config.errors import CheckpointError
from unicom_dist.config.layout import Layout
from unicom_dist.parallel.engine import Fragment, Piece

ONE = Layout()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same model as each layout writes it."""
    folder = tmp_path_factory.mktemp("layouts")
    for number, layout in enumerate(LAYOUTS):
        save_all(folder / str(number), layout, 7, loader={"step": 7})
    return [latest(folder / str(number)) for number in range(len(LAYOUTS))]


@pytest.mark.parametrize("read", LAYOUTS, ids=lambda layout: f"{layout.sizes()} zero {layout.zero_stage}")
def test_every_layout_reads_every_other_bit_for_bit(saved, read):
    for path in saved:
        assert read_extra(path)["loader"] == {"step": 7}
        for rank in range(read.world):
            expected = state_of(read, rank)
            got = read_state(path, fragments(read, rank), expected, KINDS)
            for kind, buffers in expected.items():
                assert all(torch.equal(a, b) for a, b in zip(buffers, got[kind], strict=True)), (path, rank, kind)


def test_what_is_read_back_is_the_model_of_one_process(saved):
    for path in saved:
        checkpoint = Checkpoint(path)
        assert checkpoint.shapes["embed"] == (VOCABULARY, 6)
        for kind in KINDS:
            tensors = checkpoint.tensors(kind)
            assert ("connector" in tensors) == (not kind.startswith("exp_avg"))  # frozen: no moments
            assert all(torch.equal(tensor, whole(kind, name, tensor.shape)) for name, tensor in tensors.items())


@st.composite
def pieces(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Fragment]]:
    """A shape and two fragments of it, cut along one dimension or the first."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    dim = draw(st.integers(0, len(shape) - 1))
    found = []
    for along in (dim, draw(st.sampled_from([0, dim]))):
        begin = draw(st.integers(0, shape[along]))
        piece = Piece("x", shape, along, begin, draw(st.integers(0, shape[along] - begin)))
        offset = draw(st.integers(0, piece.numel))
        found.append(Fragment(piece, offset, draw(st.integers(0, piece.numel - offset)), 0, 0))
    return shape, found if draw(st.booleans()) else found[::-1]


@given(pieces())
@settings(max_examples=400, deadline=None)
def test_what_two_fragments_share_is_what_both_hold(drawn):
    shape, (source, target) = drawn
    numbered = torch.arange(torch.Size(shape).numel()).view(shape)
    ours, theirs = (f.piece.of(numbered).flatten()[f.offset : f.offset + f.numel].tolist() for f in (source, target))
    pairs = [
        (part.source + row * part.source_pitch + column, part.target + row * part.target_pitch + column)
        for part in shared(source, target)
        for row in range(part.rows)
        for column in range(part.columns)
    ]
    assert [ours[a] for a, _ in pairs] == [theirs[b] for _, b in pairs]
    assert sorted(ours[a] for a, _ in pairs) == sorted(set(ours) & set(theirs))


def test_a_file_is_ordinary_safetensors(tmp_path):
    tensors = {"x": torch.randn(3, 4), "empty": torch.zeros(0), "bytes": torch.arange(5, dtype=torch.uint8)}
    tensors["half"] = torch.randn(6).bfloat16()
    write_tensors(tmp_path / "f.safetensors", tensors, {"note": "hello"})
    loaded = load_file(tmp_path / "f.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert TensorFile(tmp_path / "f.safetensors").metadata == {"note": "hello"}


def test_training_goes_on_while_the_file_is_written(tmp_path, monkeypatch):
    allowed = threading.Event()
    slow = stores.write_tensors
    monkeypatch.setattr(stores, "write_tensors", lambda *args: (allowed.wait(10), slow(*args)))
    store = CheckpointStore(tmp_path, mesh_of(ONE, 0))
    state = state_of(ONE, 0)
    kept = {kind: [b.clone() for b in buffers] for kind, buffers in state.items()}
    store.save(1, state, fragments(ONE, 0), {}, replicated=True)
    for buffers in state.values():
        for buffer in buffers:
            buffer.zero_()  # the next step changes the weights while the thread still writes
    assert latest(tmp_path) is None
    allowed.set()
    store.wait()
    got = read_state(latest(tmp_path), fragments(ONE, 0), kept, ("weight", "exp_avg"))
    assert torch.equal(got["weight"][0], kept["weight"][0])


def test_a_full_disk_is_said_and_the_checkpoint_before_it_stays(tmp_path, monkeypatch):
    (store,) = save_all(tmp_path, ONE)

    def full(path, *args):
        path.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stores, "write_tensors", full)
    store.save(2, state_of(ONE, 0), fragments(ONE, 0), {}, replicated=True)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        store.wait()
    assert "kept" in caught.value.why
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000001"]
    assert not list(tmp_path.glob(".step-*"))


def test_a_checkpoint_that_cannot_fit_is_refused_before_a_byte_is_written(tmp_path, monkeypatch):
    (store,) = save_all(tmp_path, ONE)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(CheckpointError, match="does not fit"):
        store.save(2, state_of(ONE, 0), fragments(ONE, 0), {}, replicated=True)


def test_a_rank_that_never_finishes_leaves_no_checkpoint(tmp_path):
    two = Layout(dp=2, zero_stage=3)
    store = CheckpointStore(tmp_path, mesh_of(two, 0), timeout_s=0.2)
    store.save(3, state_of(two, 0), fragments(two, 0), {}, replicated=False)
    with pytest.raises(CheckpointError, match=r"rank-00001-of-00002\.safetensors after"):
        store.wait()
    assert latest(tmp_path) is None


@pytest.mark.parametrize("call", range(1, 7))
def test_a_kill_at_any_moment_leaves_the_checkpoint_before_or_a_whole_one(tmp_path, call):
    save_all(tmp_path, ONE, 1)
    child = os.fork()
    if child == 0:  # dies in its n-th request to the disk: two files, COMPLETE, their names, the folder's, and its own
        calls, real = iter(range(1, 100)), {name: getattr(os, name) for name in ("fsync", "replace")}

        def dying(name: str, *args: object) -> None:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            real[name](*args)

        os.fsync, os.replace = partial(dying, "fsync"), partial(dying, "replace")
        save_all(tmp_path, ONE, 2)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    found = latest(tmp_path)
    assert found.name == ("step-000002" if call == 6 else "step-000001")
    got = read_state(found, fragments(ONE, 0), state_of(ONE, 0), ("ema",))
    assert all(torch.equal(a, b) for a, b in zip(got["ema"], state_of(ONE, 0)["ema"], strict=True))
    left = list(tmp_path.glob(".step-*"))
    assert len(left) == (call < 6)
    for folder in left if call < 3 else []:
        with pytest.raises(CheckpointError, match="is not a checkpoint"):
            read_extra(folder)


def test_leftovers_of_a_killed_writer_are_removed_at_the_next_start(tmp_path):
    (tmp_path / ".step-000009.dead").mkdir(parents=True)
    CheckpointStore(tmp_path, mesh_of(ONE, 0))
    assert not list(tmp_path.glob(".step-*"))


def test_another_model_is_named_by_its_first_difference(tmp_path):
    save_all(tmp_path, ONE)
    own = fragments(ONE, 0)
    other = [replace(f, piece=Piece("scale", (9,))) if f.name == "scale" else f for f in own]
    with pytest.raises(CheckpointError, match=r"scale: \[\] saved, \[9\] configured"):
        read_state(latest(tmp_path), other, state_of(ONE, 0), ("weight",))
    more = [replace(f, piece=replace(f.piece, name="layers.3.q")) if f.name == "layers.2.q" else f for f in own]
    with pytest.raises(CheckpointError, match=r"layers\.3\.q: absent saved, \[16, 6\] configured"):
        read_state(latest(tmp_path), more, state_of(ONE, 0), ("weight",))
    check_model(latest(tmp_path), own, mesh_of(ONE, 0))
    with pytest.raises(CheckpointError, match=r"layers\.2\.k: \[4, 6\] saved, absent configured"):
        check_model(latest(tmp_path), [f for f in own if "layers.2" not in f.name], mesh_of(ONE, 0))


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"format": 1, "step": 1, "dp": 1, "shapes": {}}, "format 1, this version reads 2"),
        ({}, "'format'"),
        ([], "list"),
    ],
)
def test_a_foreign_folder_is_refused(tmp_path, state, reason):
    save_all(tmp_path, ONE)
    (latest(tmp_path) / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="cannot be used") as caught:
        read_extra(latest(tmp_path))
    assert reason in caught.value.why


def cut_short(path: Path, other: Path) -> str:
    path.write_bytes(path.read_bytes()[:-100])
    return "its header describes"


def of_another_save(path: Path, other: Path) -> str:
    path.write_bytes(other.read_bytes())
    return "its header is another one"


def gone(path: Path, other: Path) -> str:
    path.unlink()
    return "there is no such file"


def one_bit(path: Path, other: Path) -> str:
    content = bytearray(path.read_bytes())
    content[-4000] ^= 16
    path.write_bytes(content)
    return "are not what was written"


def never_finished(path: Path, other: Path) -> str:
    path.write_bytes(bytes(path.stat().st_size))
    return "its writer did not finish"


@pytest.mark.parametrize("damage", [cut_short, of_another_save, gone, never_finished, one_bit])
def test_a_damaged_or_foreign_file_is_named_with_the_reason(tmp_path, damage):
    layout = Layout(tp=2)
    save_all(tmp_path, layout, 1)
    save_all(tmp_path, layout, 2)
    one, two = checkpoints(tmp_path)
    name = "rank-00001-of-00002.safetensors"
    reason = damage(two / name, one / name)
    with pytest.raises(CheckpointError, match=name) as caught:
        read_state(two, fragments(ONE, 0), state_of(ONE, 0), KINDS)
    assert reason in caught.value.why
    assert caught.value.remedy == f"remove {two} to continue from step-000001, which is complete"


def test_cuts_that_do_not_make_a_whole_model_are_found_while_writing(tmp_path):
    layout = Layout(tp=2)
    two = [CheckpointStore(tmp_path, mesh_of(layout, rank), timeout_s=5) for rank in range(2)]
    for rank in (1, 0):
        twice = [replace(f, piece=replace(f.piece, owner=True)) for f in fragments(layout, rank)]
        two[rank].save(1, state_of(layout, rank), twice, {}, replicated=True)
    two[1].wait()
    with pytest.raises(CheckpointError, match=r"wrote 12 values of layers\.0\.norm, which has 6"):
        two[0].wait()
    assert latest(tmp_path) is None


def test_the_random_state_returns_on_the_same_number_of_ranks_only(tmp_path):
    torch.manual_seed(5)
    save_all(tmp_path, ONE)
    expected = torch.rand(3)
    torch.set_rng_state(read_rng(latest(tmp_path), mesh_of(ONE, 0)))
    assert torch.equal(torch.rand(3), expected)
    assert read_rng(latest(tmp_path), mesh_of(Layout(dp=2), 0)) is None


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


def test_the_staging_area_is_kept_from_one_save_to_the_next(tmp_path):
    store, state = CheckpointStore(tmp_path, mesh_of(ONE, 0)), state_of(ONE, 0)
    places = []
    for step in (1, 2):
        for buffers in state.values():
            for buffer in buffers:
                buffer += step
        store.save(step, state, fragments(ONE, 0), {}, replicated=True)
        store.wait()
        areas = [area for areas in store._staging.values() for area in areas]
        assert all(torch.equal(a, b) for a, b in zip(areas, (b for v in state.values() for b in v), strict=True))
        assert not any(area.is_pinned() for area in areas)  # page-locked memory is for copies from a GPU
        places.append([area.data_ptr() for area in areas])
    assert places[0] == places[1]
