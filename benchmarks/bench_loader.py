"""Reading samples: ours against the memory map itself, webdataset and energon, on the same tars.

A sample is a latent [256, 64] float16 (32 KiB) and a caption in JSON; the product is a batch array of 64 latents and
the captions' bytes. The tars are in the page cache. `copy` copies the same bytes out of a memory map into such a batch,
from offsets known beforehand, and does nothing else: what any reader that copies has to spend. Both go in random
order, the peers in the order of the tars. Resuming is the wall time of `load_state_dict` at positions up to 10^12.

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
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from common import Goal, Timing, importable, interleaved, publish

from unicom_dist.config.schema import Config
from unicom_dist.data.loader import PriorLoader, build_vocabulary
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.npy import gather, read_npy, write_npy
from unicom_dist.data.shardset import ShardSet
from unicom_dist.data.tar import ShardWriter
from unicom_dist.models.codec import LatentStats
from unicom_dist.testing.shards import write_tiny_sets
from unicom_dist.testing.tiny import tiny_config, write_tiny_assets

TOKENS, CHANNELS, BATCH, SHARDS = 256, 64, 64, 3
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


def ours(folder: Path, order: list[int]) -> Callable[[], None]:
    """What the loaders do: random access through the index, arrays checked and gathered into a batch."""
    pairs = ShardSet(folder)

    def run() -> None:
        for first in [*range(0, len(order), BATCH)] * PASSES:
            chosen = order[first : first + BATCH]
            latents, texts = pairs.columns(chosen, "latent.npy", "json")
            gather(latents, lambda n: pairs.key(chosen[n])).view(len(chosen), TOKENS, CHANNELS)  # noqa: B023
            _ = [bytes(text) for text in texts]

    return run


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


def prior_loader(folder: Path) -> tuple[PriorLoader, Config]:
    """The loader of a prior stage over latents of the same size, with captions, packing, noise and times."""
    config = tiny_config(folder, codec={"compressor": {"channels": CHANNELS}}, prior={"vocabulary": "full"})
    write_tiny_assets(folder)
    write_tiny_sets(config, 512, 1, grids=[(16, 16)], shard_samples=256)
    stage = config.stage("pretrain").model_copy(update={"row_positions": 4096, "batch": 4})
    stats = LatentStats(torch.zeros(CHANNELS), torch.ones(CHANNELS))
    return PriorLoader(config, stage, build_vocabulary(config), stats), config


def resume_times(loader: PriorLoader) -> dict[str, Timing]:
    """Wall seconds of `load_state_dict`, by samples consumed per task; caches are filled before."""
    loader.next_step()
    start = loader.state_dict()
    times = {}
    for consumed in (0, 10**4, 10**8, 10**12):
        state = json.loads(json.dumps(start))
        state["ordinals"] = {task: n + consumed for task, n in state["ordinals"].items()}
        state["counts"] = {task: n + consumed for task, n in state["counts"].items()}
        state["open_rows"] = [[[task, n + consumed] for task, n in row] for row in state["open_rows"]]
        seconds = []
        for _ in range(9):
            before = time.perf_counter()
            loader.load_state_dict(state)
            seconds.append(time.perf_counter() - before)
        times[f"{consumed:.0e}"] = Timing.of(seconds)
    return times


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
        methods = {"copy out of the map": copy_out(folder, order), "ours": ours(folder, order)}
        if importable("webdataset"):
            methods["webdataset"] = webdataset_raw(folder)
            methods["webdataset, decode()"] = webdataset_decoded(folder)
        if importable("megatron.energon"):
            methods["energon"] = energon(folder, arguments.samples)
        timings = interleaved(methods, arguments.rounds)
        loader, _ = prior_loader(Path(temporary) / "prior")
        with loader:
            resume = resume_times(loader)
            steps = 8
            before, drawn = time.process_time(), 0
            for _ in range(steps):
                drawn += sum(len(batch.keys) for batch in loader.next_step())
            per_sample = (time.process_time() - before) / drawn

    counts = dict.fromkeys(timings, arguments.samples)
    counts["ours"] = counts["copy out of the map"] = arguments.samples * PASSES
    counts["energon"] = arguments.samples // BATCH * BATCH
    rate = {name: counts[name] / timing.median for name, timing in timings.items()}
    rows = [
        [name, f"{rate[name]:,.0f}", f"{rate['ours'] / rate[name]:.2f}", timing.spread]
        for name, timing in timings.items()
    ]
    goals = [Goal("ours / copy out of the map", rate["ours"] / rate["copy out of the map"], 0.8)]
    if "webdataset" in rate:
        goals.append(Goal("ours / webdataset", rate["ours"] / rate["webdataset"], 5))
    if "energon" in rate:
        goals.append(Goal("ours / energon", rate["ours"] / rate["energon"], 15))
    slowest = max(timing.median for timing in resume.values()) * 1e3
    goals.append(Goal("resume, whatever was consumed", slowest, 20, at_least=False, unit="ms"))
    print(
        f"\nwhole prior loader (captions, packing, noise): {per_sample * 1e6:.0f} us CPU per sample of {TOKENS} latents"
    )
    print("resume: " + ", ".join(f"{at} samples {timing.median * 1e3:.1f} ms" for at, timing in resume.items()) + "\n")
    figures = {
        "sample": f"latent [{TOKENS}, {CHANNELS}] float16 and caption",
        "cpu_seconds": timings,
        "samples_per_cpu_second": rate,
        "prior_loader_cpu_us_per_sample": per_sample * 1e6,
        "resume_s": resume,
    }
    columns = ["reader", "samples/s (CPU)", "ours is x faster", "spread"]
    met = publish("bench_loader", columns, rows, goals, figures, ["webdataset", "megatron-energon"])
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
