"""A byte that changed after it was written is found by whoever reads it, under every layout. One process."""

from pathlib import Path

import pytest
import torch
from checkpoint_ranks import KINDS, fragments, save_all, state_of

from unicom_dist.checkpoint import store, tensorfile
from unicom_dist.checkpoint.saved import COMPLETE, Checkpoint, checkpoints, latest, read_state
from unicom_dist.checkpoint.tensorfile import TensorFile, TensorWriter
from unicom_dist.config.errors import CheckpointError
from unicom_dist.config.layout import Layout

WRITTEN = Layout(tp=2)
READ = [
    WRITTEN,
    Layout(),
    Layout(dp=3, zero_stage=3),
    Layout(tp=4, zero_stage=3),
    Layout(tp=2, pp=2, dp=2, zero_stage=3),
]


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with a digest for so few bytes that they begin and end within tensors and within numbers."""
    monkeypatch.setattr(tensorfile, "DIGEST_OF", 70)
    save_all(tmp_path, WRITTEN, 1)
    save_all(tmp_path, WRITTEN, 2)
    return latest(tmp_path)


def read_all(path: Path, layout: Layout) -> None:
    """What all ranks of the layout read together; it is as it was written."""
    for rank in range(layout.world):
        expected = state_of(layout, rank)
        got = read_state(path, fragments(layout, rank), expected, KINDS)
        for kind, buffers in expected.items():
            assert all(torch.equal(a, b) for a, b in zip(buffers, got[kind], strict=True))


def flip(path: Path, place: int) -> None:
    """Change a bit of the byte at `place`."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("layout", READ, ids=lambda layout: f"{layout.sizes()}")
def test_each_byte_counts_under_each_layout(saved, layout):
    read_all(saved, layout)
    path = sorted(saved.glob("rank-*.safetensors"))[1]
    file = TensorFile(path)
    begin, end = file._data, file.position("rng/torch", 0, 0, torch.uint8)  # the random state is read elsewhere
    for place in (begin, end - 1, *range(begin + 1, end, (end - begin) // 20)):
        flip(path, place)
        with pytest.raises(CheckpointError, match=path.name) as caught:
            read_all(saved, layout)
        assert caught.value.exit_code == 5
        assert "are not what was written" in caught.value.why
        assert f"remove {saved} to continue from step-000001, which is complete" == caught.value.remedy
        flip(path, place)
    read_all(saved, layout)


def test_a_changed_byte_is_found_by_who_reads_it_and_by_nobody_else(saved):
    first, second = sorted(saved.glob("rank-*.safetensors"))
    flip(second, TensorFile(second)._data)
    read_state(saved, fragments(WRITTEN, 0), state_of(WRITTEN, 0), KINDS)
    with pytest.raises(CheckpointError, match=second.name):
        read_state(saved, fragments(WRITTEN, 1), state_of(WRITTEN, 1), KINDS)
    assert first != second


def test_the_last_checkpoint_left_has_none_before_it(saved):
    one, _ = checkpoints(saved.parent)
    path = one / "rank-00000-of-00002.safetensors"
    flip(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(one).file(0).read("rng/torch")
    assert caught.value.remedy == f"remove {one} to begin the stage anew: no checkpoint before it is left"


def test_a_changed_description_is_refused(saved):
    text = (saved / "state.json").read_text()
    assert '"step": 2' in text
    (saved / "state.json").write_text(text.replace('"step": 2', '"step": 3'))
    with pytest.raises(CheckpointError, match=r"state\.json cannot be used") as caught:
        Checkpoint(saved)
    assert "changed on the disk" in caught.value.why


def test_a_checkpoint_written_without_digests_is_read(tmp_path, monkeypatch):
    def unchecked(path, tensors, metadata) -> None:
        with TensorWriter(path, tensors.keys(), metadata) as writer:
            for name, tensor in tensors.items():
                writer.add(name, tensor)

    monkeypatch.setattr(store, "write_tensors", unchecked)
    save_all(tmp_path, WRITTEN, 1)
    (latest(tmp_path) / COMPLETE).write_text("")
    for layout in READ:
        read_all(latest(tmp_path), layout)


def test_a_digest_is_kept_of_each_piece_of_the_data(tmp_path):
    piece = tensorfile.DIGEST_OF // 4  # numbers
    values = torch.randn(piece * 2 + 5)
    tensorfile.write_tensors(tmp_path / "f", {"a": values[:7], "b": values[7:]}, {})
    file = TensorFile(tmp_path / "f")
    assert len(file._digests) == 3 * 16
    assert torch.equal(torch.cat([file.read("a"), file.read("b")]), values)
    part = torch.empty(11)
    file.read_at(file.position("b", piece - 12, 11, torch.float32), part)  # across the first border
    assert torch.equal(part, values[piece - 5 : piece + 6])
    flip(tmp_path / "f", file._data + 8 * piece + 3)
    again = TensorFile(tmp_path / "f")
    again.read_at(again.position("b", 0, 11, torch.float32), part)  # the first piece is as it was
    with pytest.raises(CheckpointError, match="cannot be read"):
        again.read("b")
