"""What a checkpoint costs: the stall of a step, the write, the load, and the load under another layout.

The state is that of a small transformer (weights, two moments, average in float32). Beside ours, in the same rounds: a
copy of the state in memory (no stall can be shorter), one file of the same bytes written and synced, the files read
into fresh memory, and torch.distributed.checkpoint with its thread and its process. The clock is wall time: waiting is
the point. Files are in the page cache when they are read.

Ours and the limits take turns without torch's between them, which leave work behind; a goal is the median of the ratios
of the same round, because a disk is fast in one second and slow in the next.

    python benchmarks/bench_checkpoint.py [--layers 12] [--rounds 21] [--folder FOLDER]
"""

import argparse
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from common import Goal, Timing, in_turn, publish
from torch import Tensor

from unicom_dist.checkpoint.saved import latest, read_state
from unicom_dist.checkpoint.store import CheckpointStore
from unicom_dist.config.layout import Layout
from unicom_dist.parallel.engine import Fragment, Piece, fragments_of
from unicom_dist.parallel.mesh import Axis, Mesh

WIDTH, FFN = 384, 1152
KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
# Every tensor of a layer: shape, and the dimension that tensor parallelism cuts (None: held whole).
LAYER: dict[str, tuple[tuple[int, ...], int | None]] = {
    "q": ((WIDTH, WIDTH), 0),
    "k": ((WIDTH, WIDTH), 0),
    "v": ((WIDTH, WIDTH), 0),
    "o": ((WIDTH, WIDTH), 1),
    "gate": ((FFN, WIDTH), 0),
    "up": ((FFN, WIDTH), 0),
    "down": ((WIDTH, FFN), 1),
    "norm": ((WIDTH,), None),
}
PEER_ROUNDS = 5
WRITTEN = Layout(tp=4)  # how the checkpoint that is loaded was written
OTHERS = (Layout(tp=2, dp=2, zero_stage=3), Layout(dp=4, zero_stage=3), Layout(pp=4))
Method = Callable[[], dict[str, float]]  # seconds by what they were spent on


def mesh_of(layout: Layout, rank: int) -> Mesh:
    """A rank of `layout` that needs no process group."""
    place = layout.coordinates(rank)
    zero = Axis("zero", place["dp"], layout.dp)
    axes = {axis: Axis(axis, place[axis], size) for axis, size in layout.sizes().items()}
    return Mesh(rank, layout.world, torch.device("cpu"), layout, zero=zero, **axes)


class Local(CheckpointStore):
    """A store of one of several ranks in this process: they agree on the name of an attempt."""

    def __init__(self, folder: Path, mesh: Mesh) -> None:
        super().__init__(folder, Mesh(0, 1, mesh.device), keep=1 << 30)
        self.mesh, self._attempt = mesh, "bench"


def fragments(layout: Layout, rank: int, layers: int) -> list[Fragment]:
    """What a rank holds."""
    place, found, start = layout.coordinates(rank), [], 0
    for layer in range(layers):
        if layer * layout.pp // layers != place["pp"]:
            continue
        for name, (shape, dim) in LAYER.items():
            length = shape[dim or 0] // (layout.tp if dim is not None else 1)
            begin = place["tp"] * length if dim is not None else 0
            owner = dim is not None or place["tp"] == 0
            piece = Piece(f"layers.{layer}.{name}", shape, dim or 0, begin, length, owner=owner)
            share = -(-piece.numel // layout.dp)
            offset = min(place["dp"] * share, piece.numel)
            numel = min(share, piece.numel - offset)
            found += fragments_of([piece], offset, numel, 0, start)
            start += numel
    return found


def state_of(held: list[Fragment]) -> dict[str, list[Tensor]]:
    """Buffers of a rank with something in them."""
    size = sum(f.numel for f in held)
    return {kind: [torch.randn(size)] for kind in KINDS}


def timed(action: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def raw_write(state: dict[str, list[Tensor]], path: Path) -> None:
    """One file of the state's bytes, synced."""
    with path.open("wb") as file:
        for buffers in state.values():
            for buffer in buffers:
                file.write(buffer.view(torch.uint8).numpy())  # type: ignore[arg-type]
        os.fsync(file.fileno())


def raw_read(folder: Path) -> None:
    """Every rank's file of a folder into fresh memory."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            room = memoryview(mmap.mmap(-1, path.stat().st_size))  # malloc might hand out memory used before
            while room:
                room = room[file.readinto(room) or len(room) :]


class Saving:
    """Everything that is measured around a save of one rank's state."""

    def __init__(self, folder: Path, layers: int) -> None:
        self.folder, self.step = folder, 0
        self.held = fragments(Layout(), 0, layers)
        self.state = state_of(self.held)
        self.copy = {kind: [buffer.clone() for buffer in buffers] for kind, buffers in self.state.items()}
        self.store = CheckpointStore(folder / "ours", Mesh(0, 1, torch.device("cpu")), keep=1 << 30)
        self.tensors = {
            f"{kind}/{f.name}": buffers[0][f.start : f.start + f.numel].view(f.piece.shape)
            for kind, buffers in self.state.items()
            for f in self.held
        }

    @property
    def bytes(self) -> int:
        """Of the state."""
        return sum(buffer.nbytes for buffers in self.state.values() for buffer in buffers)

    def methods(self) -> dict[str, Method]:
        """Ours and the limits, by name."""
        return {"copy in memory": self.memory, "one file, synced": self.one_file, "ours": self.ours}

    def peers(self) -> dict[str, Method]:
        """By name."""
        return {
            "DCP, synchronous": self.dcp,
            "DCP, thread": lambda: self.dcp_async("thread"),
            "DCP, process": lambda: self.dcp_async("process"),
        }

    def memory(self) -> dict[str, float]:
        """The shortest possible stall."""

        def copy() -> None:
            for kind, buffers in self.state.items():
                for target, buffer in zip(self.copy[kind], buffers, strict=True):
                    target.copy_(buffer)

        return {"stall": timed(copy)}

    def one_file(self) -> dict[str, float]:
        """The shortest possible write."""
        return {"write": timed(lambda: raw_write(self.state, self.folder / "raw"))}

    def ours(self) -> dict[str, float]:
        """A save, and the wait for its end."""
        self.step += 1
        stall = timed(lambda: self.store.save(self.step, self.state, self.held, {}, replicated=True))
        return {"stall": stall, "write": stall + timed(self.store.wait)}

    def dcp(self) -> dict[str, float]:
        """torch.distributed.checkpoint, the call that returns when all is written."""
        import torch.distributed.checkpoint as dcp

        seconds = timed(lambda: dcp.save(self.tensors, checkpoint_id=self.folder / "dcp"))
        return {"stall": seconds, "write": seconds}

    def dcp_async(self, how: str) -> dict[str, float]:
        """torch.distributed.checkpoint behind the training."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        start = time.perf_counter()
        future = dcp.async_save(
            self.tensors, checkpoint_id=self.folder / "dcp", async_checkpointer_type=AsyncCheckpointerType(how)
        )
        stall = time.perf_counter() - start
        future.result()  # type: ignore[union-attr]
        return {"stall": stall, "write": time.perf_counter() - start}

    def clear(self) -> None:
        """Remove what was written, outside of what is timed."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (self.folder / "ours").mkdir()


class Loading:
    """A checkpoint written by four ranks of `WRITTEN`, and loads of all of it by four ranks of any layout."""

    def __init__(self, folder: Path, layers: int) -> None:
        self.layers, self.folder = layers, folder
        stores = [Local(folder / "ours", mesh_of(WRITTEN, rank)) for rank in range(WRITTEN.world)]
        for rank, store in reversed(list(enumerate(stores))):
            held = fragments(WRITTEN, rank, layers)
            store.save(1, state_of(held), held, {}, replicated=False)
            store.wait() if rank else None
        stores[0].wait()
        found = latest(folder / "ours")
        assert found is not None
        self.path = found

    def methods(self) -> dict[str, Method]:
        """By name."""
        named: dict[str, Method] = {"read files": lambda: {"load": timed(lambda: raw_read(self.path))}}
        for layout in (WRITTEN, *OTHERS):
            named[f"ours as {shown(layout)}"] = lambda layout=layout: {"load": self.load(layout)}
        return named

    def load(self, layout: Layout) -> float:
        """Seconds of all ranks, one after the other."""
        seconds = 0.0
        for rank in range(layout.world):
            held = fragments(layout, rank, self.layers)
            like = {kind: [torch.empty(sum(f.numel for f in held))] for kind in KINDS}
            seconds += timed(lambda held=held, like=like: read_state(self.path, held, like, KINDS))
        return seconds


def shown(layout: Layout) -> str:
    """tp=4, for example."""
    return " ".join(f"{axis}={size}" for axis, size in layout.sizes().items() if size > 1)


def dcp_load(saving: Saving, folder: Path) -> Method:
    """A checkpoint of torch's loaded in place."""
    import torch.distributed.checkpoint as dcp

    dcp.save(saving.tensors, checkpoint_id=folder)
    return lambda: {"load": timed(lambda: dcp.load(saving.tensors, checkpoint_id=folder))}


Rounds = dict[str, dict[str, list[float]]]  # {method: {what: seconds of each round}}


def rounds(methods: Mapping[str, Method], count: int, clear: Callable[[], None] = lambda: None) -> Rounds:
    """Every method once unmeasured, then `count` times in turn, the order reversed every other round."""

    def cleared(method: Method) -> dict[str, float]:
        found = method()
        clear()
        return found

    taken = in_turn({name: partial(cleared, method) for name, method in methods.items()}, count)
    return {name: {what: [each[what] for each in found] for what in found[0]} for name, found in taken.items()}


def ratio(measured: Rounds, what: str, name: str, base: str) -> float:
    """Median over the rounds of what `name` took over what `base` took."""
    return statistics.median(a / b for a, b in zip(measured[name][what], measured[base][what], strict=True))


def main() -> int:
    """Measure, print, write; 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the system's temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=options.folder) as name:
        folder = Path(name)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "GLOO_SOCKET_IFNAME": "lo"}
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        for part in ("save", "load"):
            (folder / part).mkdir()
        saving, loading = Saving(folder / "save", options.layers), Loading(folder / "load", options.layers)
        saved = rounds(saving.methods(), options.rounds, saving.clear)
        loaded = rounds(loading.methods(), options.rounds)
        readers = {"DCP in place": dcp_load(saving, folder / "load" / "dcp")}
        peers = rounds(saving.peers(), PEER_ROUNDS, saving.clear) | rounds(readers, PEER_ROUNDS)
        dist.destroy_process_group()
    same = f"ours as {shown(WRITTEN)}"
    others = [ratio(loaded, "load", f"ours as {shown(layout)}", same) for layout in OTHERS]
    goals = [
        Goal("stall over a copy in memory", ratio(saved, "stall", "ours", "copy in memory"), 1.1, at_least=False),
        Goal("save over one file", ratio(saved, "write", "ours", "one file, synced"), 1.15, at_least=False),
        Goal("load over reading the files", ratio(loaded, "load", same, "read files"), 1.2, at_least=False),
        Goal("load under another layout over the same", max(others), 1.3, at_least=False),
    ]
    measured = {
        name: {what: Timing.of(seconds) for what, seconds in found.items()}
        for name, found in (saved | loaded | peers).items()
    }
    rows = [
        [name, what, f"{1000 * t.median:.0f}", t.spread, f"{saving.bytes / t.median / 1e9:.2f}"]
        for name, timings in measured.items()
        for what, t in timings.items()
    ]
    print(f"{saving.bytes / 1e6:.0f} MB of state, {len(saving.held)} tensors of {len(KINDS)} kinds\n")
    met = publish(
        "bench_checkpoint",
        ["method", "what", "ms", "spread", "GB/s"],
        rows,
        goals,
        {"bytes": saving.bytes, "tensors": len(saving.held), "seconds": measured},
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
