"""Reading samples: ours against the memory map itself, webdataset and energon, on the same tars.

A sample is a latent [256, 64] float16 (32 KiB) and a caption in JSON; the product is a batch array of 64 latents and
the captions' bytes. The tars are in the page cache. `copy` copies the same bytes out of a memory map into such a batch,
from offsets known beforehand, and does nothing else: what any reader that copies has to spend. Both go in random
order, the peers in the order of the tars. The same reader behind a worker process of torch's DataLoader, and the whole
`PriorLoader` with latents of that size (captions, packing, noise and times), stand beside it. The clock is CPU time, of
the worker process as well. Resuming is wall time, at positions up to 10^12: of `load_state_dict`, and until the first
packed row is there.

    python benchmarks/bench_loader.py [--samples 3000] [--rounds 7]
"""

import argparse
import json
import mmap
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import torch
from common import Goal, Timing, importable, in_turn, interleaved, publish

from unicom_dist.data.loader import PriorLoader, build_vocabulary
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.npy import gather, read_npy, write_npy
from unicom_dist.data.shardset import ShardSet
from unicom_dist.data.tar import ShardWriter
from unicom_dist.models.codec import LatentStats
from unicom_dist.testing.shards import write_tiny_sets
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets

TOKENS, CHANNELS, BATCH, SHARDS = 256, 64, 64, 3
ROWS = 100  # packed rows per round
COPY, OURS, WORKER, PRIOR = "copy out of the map", "ours", "ours in a DataLoader worker", "prior loader"
WEBDATASET, ENERGON = "webdataset", "energon"
PASSES = 10  # over the data per round, for the readers that take milliseconds
ARRAY_BYTES = TOKENS * CHANNELS * 2


def write_tars(folder: Path, samples: int) -> None:
    """`samples` latents with captions in a few tars."""
    generator = np.random.default_rng(0)
    manifest = Manifest(fingerprint="bench")
    for shard in range(SHARDS):
        with ShardWriter(folder / f"bench-{shard:06d}.tar") as writer:
            for number in range(shard * samples // SHARDS, (shard + 1) * samples // SHARDS):
                latent = generator.standard_normal((TOKENS, CHANNELS)).astype(np.float16)
                text = json.dumps({"caption": f"picture number {number}", "grid": [16, 16]}).encode()
                writer.write(f"{number:07d}", {"latent.npy": write_npy(latent), "json": text})
        manifest.shards.append(writer.entry)
    manifest.write(folder)


def copy_out(folder: Path, order: list[int]) -> Callable[[], None]:
    """Latents out of the map into a batch, captions out of the map into bytes, from offsets known beforehand."""
    spans: list[tuple[memoryview, int, int, int, int]] = []
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as file, tarfile.open(path) as archive:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            latents, texts = (list(archive)[n::2] for n in (0, 1))
            for one, two in zip(latents, texts, strict=True):
                end = one.offset_data + one.size
                spans.append((content, end - ARRAY_BYTES, end, two.offset_data, two.offset_data + two.size))

    def run() -> None:
        for first in [*range(0, len(order), BATCH)] * PASSES:
            chosen = order[first : first + BATCH]
            batch, captions = memoryview(np.empty(len(chosen) * ARRAY_BYTES, np.uint8)), []
            for row, number in enumerate(chosen):
                content, a, b, c, d = spans[number]
                batch[row * ARRAY_BYTES : (row + 1) * ARRAY_BYTES] = content[a:b]
                captions.append(bytes(content[c:d]))

    return run


class Batches:
    """What the loaders do: random access through the index, arrays checked and gathered into a batch."""

    def __init__(self, folder: Path) -> None:
        self._pairs = ShardSet(folder)

    def __getitem__(self, chosen: list[int]) -> tuple[torch.Tensor, list[bytes]]:
        latents, texts = self._pairs.columns(chosen, "latent.npy", "json")
        batch = gather(latents, lambda n: self._pairs.key(chosen[n])).view(len(chosen), TOKENS, CHANNELS)
        return batch, [bytes(text) for text in texts]


def ours(folder: Path, order: list[int]) -> Callable[[], None]:
    """`Batches` in this process."""
    batches = Batches(folder)

    def run() -> None:
        for first in [*range(0, len(order), BATCH)] * PASSES:
            batches[order[first : first + BATCH]]

    return run


def data_loader(folder: Path, order: list[int]) -> Callable[[], None]:
    """`Batches` in a worker process of torch's DataLoader, which lives as long as this one."""
    chosen = [order[first : first + BATCH] for first in range(0, len(order), BATCH)] * PASSES
    loader: Any = torch.utils.data.DataLoader(
        Batches(folder),  # type: ignore[arg-type]
        sampler=chosen,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=1,
        persistent_workers=True,
    )

    def run() -> None:
        for _ in loader:
            pass

    return run


def cpu_s() -> float:
    """CPU seconds of this process and of its worker process."""
    workers = [child.cpu_times() for child in psutil.Process().children()]
    return time.process_time() + sum(used.user + used.system for used in workers)


def webdataset_raw(folder: Path) -> Callable[[], None]:
    """webdataset's iterator without its decoders, latents read into a batch array by our function."""
    import webdataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]

    def run() -> None:
        samples = iter(webdataset.WebDataset(urls, shardshuffle=False))
        while chosen := list(take(samples, BATCH)):
            batch, captions = np.empty((len(chosen), TOKENS, CHANNELS), np.float16), []
            for row, sample in enumerate(chosen):
                batch[row] = read_npy(memoryview(sample["latent.npy"]), sample["__key__"])
                captions.append(sample["json"])

    return run


def webdataset_decoded(folder: Path) -> Callable[[], None]:
    """webdataset as its documentation shows it: decode() and batched()."""
    import webdataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]

    def run() -> None:
        data = webdataset.WebDataset(urls, shardshuffle=False).decode().to_tuple("latent.npy", "json").batched(BATCH)
        for _ in data:
            pass

    return run


def energon(folder: Path, samples: int) -> Callable[[], None]:
    """energon's restorable loader in this process (0 workers), raw samples cooked into arrays, batches stacked."""
    import subprocess

    from megatron import energon as en

    copy = folder.with_name("energon")  # its index has the name of ours, so it gets the tars under another folder
    copy.mkdir()
    for path in folder.glob("*.tar"):
        (copy / path.name).hardlink_to(path)

    command = [
        sys.executable,
        "-m",
        "megatron.energon.cli.main",
        "prepare",
        "--non-interactive",
        "--split-ratio",
        "1,0,0",
    ]
    command += ["--sample-type", "CrudeWebdataset", "--force-overwrite", "--no-progress", str(copy)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    @en.edataclass
    class Pair(en.Sample):
        latent: Any
        caption: bytes

    @en.stateless
    def cook(sample: dict[str, Any]) -> Any:
        latent = read_npy(memoryview(sample["latent.npy"]), sample["__key__"])
        return Pair(**en.basic_sample_keys(sample), latent=latent, caption=sample["json"])

    class Encoder(en.DefaultTaskEncoder[Any, Any, Any, Any]):
        decoder = None
        cookers = (en.Cooker(cook),)

        @en.stateless
        def batch(self, samples: list[Any]) -> Any:
            return np.stack([sample.latent for sample in samples]), [sample.caption for sample in samples]

    config = en.WorkerConfig(rank=0, world_size=1, num_workers=0)
    data = en.get_train_dataset(
        copy,
        worker_config=config,
        batch_size=BATCH,
        shuffle_buffer_size=None,
        max_samples_per_sequence=100,
        task_encoder=Encoder(),
    )
    batches = iter(en.get_savable_loader(data))

    def run() -> None:
        for _ in range(samples // BATCH):
            next(batches)

    return run


def take(iterator: Iterator[Any], count: int) -> Iterator[Any]:
    """The next `count` items, or as many as there are."""
    for _, item in zip(range(count), iterator, strict=False):
        yield item


def prior_loader(folder: Path) -> PriorLoader:
    """The loader of a prior stage over latents of the same size, with captions, packing, noise and times."""
    config = tiny_config(folder, codec={"compressor": {"channels": CHANNELS}}, prior={"vocabulary": "full"})
    write_tiny_assets(folder)
    write_tiny_sets(config, 512, 1, grids=[(16, 16)], shard_samples=256)
    stage = config.stage("pretrain").model_copy(update={"row_positions": 4096, "batch": 1, "micro_batches": 1})
    stats = LatentStats(torch.zeros(CHANNELS), torch.ones(CHANNELS))
    return PriorLoader(config, stage, build_vocabulary(config), stats)


def packed_rows(loader: PriorLoader, start: dict[str, Any]) -> Callable[[], int]:
    """The samples of ROWS packed rows from `start` on. What the loader's thread prepares beyond them counts as time."""

    def run() -> int:
        loader.load_state_dict(start)
        drawn = sum(len(loader.next_step()[0].keys) for _ in range(ROWS))
        loader.close()
        return drawn

    return run


def resume_times(loader: PriorLoader, start: dict[str, Any], rounds: int) -> dict[str, tuple[Timing, Timing]]:
    """Wall seconds of `load_state_dict`, and with the first step after it, by samples consumed per task."""

    def once(state: dict[str, Any]) -> tuple[float, float]:
        before = time.perf_counter()
        loader.load_state_dict(state)
        loaded = time.perf_counter()
        loader.next_step()
        first = time.perf_counter()
        loader.close()
        return loaded - before, first - before

    methods = {}
    for consumed in (0, 10**4, 10**8, 10**12):
        state = json.loads(json.dumps(start))
        state["drawn"] = {task: n + consumed for task, n in state["drawn"].items()}
        state["counts"] = {task: n + consumed for task, n in state["counts"].items()}
        state["open_rows"] = [[[task, n + consumed] for task, n in row] for row in state["open_rows"]]
        methods[f"{consumed:.0e}"] = partial(once, state)
    found = in_turn(methods, rounds)
    return {at: (Timing.of([a for a, _ in pairs]), Timing.of([b for _, b in pairs])) for at, pairs in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tars"
        write_tars(folder, arguments.samples)
        order = np.random.default_rng(1).permutation(arguments.samples).tolist()
        methods: dict[str, Callable[[], object]] = {
            COPY: copy_out(folder, order),
            OURS: ours(folder, order),
            WORKER: data_loader(folder, order),
        }
        if importable("webdataset"):
            methods[WEBDATASET] = webdataset_raw(folder)
            methods[f"{WEBDATASET}, decode()"] = webdataset_decoded(folder)
        if importable("megatron.energon"):
            methods[ENERGON] = energon(folder, arguments.samples)
        with prior_loader(Path(temporary) / "prior") as loader:
            loader.next_step()
            loader.close()
            start = loader.state_dict()
            methods[PRIOR] = packed_rows(loader, start)
            drawn = packed_rows(loader, start)()
            timings = interleaved(methods, arguments.rounds, cpu_s)
            resume = resume_times(loader, start, arguments.rounds)

    counts = dict.fromkeys(timings, arguments.samples)
    counts[COPY] = counts[OURS] = counts[WORKER] = arguments.samples * PASSES
    counts[ENERGON] = arguments.samples // BATCH * BATCH
    counts[PRIOR] = drawn
    rate = {name: counts[name] / timing.median for name, timing in timings.items()}
    rows = [
        [name, f"{rate[name]:,.0f}", f"{rate[OURS] / rate[name]:.2f}", timing.spread]
        for name, timing in timings.items()
    ]
    goals = [
        Goal(f"{OURS} / {peer}", rate[OURS] / rate[peer] if peer in rate else None, bound)
        for peer, bound in ((COPY, 0.8), (WEBDATASET, 5), (ENERGON, 15))
    ]
    for n, what in enumerate(("load_state_dict", "resume to the first row")):
        slowest = 1e3 * max(pair[n].median for pair in resume.values())
        goals.append(Goal(f"{what}, whatever was consumed", slowest, 20, at_least=False, unit="ms"))
    print("\nload_state_dict, and to the first row:")
    for at, (loaded, first) in resume.items():
        print(f"  after {at} samples: {1e3 * loaded.median:.1f} ms, {1e3 * first.median:.1f} ms")
    print()
    figures = {
        "sample": f"latent [{TOKENS}, {CHANNELS}] float16 and caption",
        "cpu_seconds": timings,
        "samples_per_cpu_second": rate,
        "resume_s": {at: {"load_state_dict": loaded, "to_first_row": first} for at, (loaded, first) in resume.items()},
    }
    columns = ["reader", "samples/s (CPU)", "ours is x faster", "spread"]
    met = publish("bench_loader", columns, rows, goals, figures, ["webdataset", "megatron-energon"])
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
