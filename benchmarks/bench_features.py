"""The feature job on Ray against the bare encoder in a loop, on the same cores and pictures.

Two actors run either the job's worker (read the shard, decode on threads, encode, write a feature tar) or the bare loop
(decode by the same function, prepare, encode, drop the result), in turn, with two encoders: EfficientNet-lite2, and a
SigLIP2 with random weights so small that decoding is a good part of the work. The clock is CPU time per picture: of
the actors for the loop; of the actors, the driver and every process of Ray for the job. `no-op` is the job with an
encoder that computes nothing: what the job itself costs per picture, with the decoding and without it.

    python benchmarks/bench_features.py [--images 256] [--rounds 7]

Uses assets/efficientnet-lite2 and assets/fluent-emoji (`unicom data fetch`).
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import Goal, Timing, in_turn, publish
from PIL import Image

from pipelines import ingest
from pipelines.features import FeatureWorker
from pipelines.parts import ShardTask
from pipelines.ray_pool import ActorPool, Resources, ray_session
from unicom_dist.config.schema import Config, EncoderConfig
from unicom_dist.data.decode import decode_image
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.tar import Shard
from unicom_dist.models.encoders import EncodedImage, Encoder, build_encoder

BATCH, SHARD = 16, 32
EFFICIENTNET, SIGLIP2 = "EfficientNet-lite2", "small SigLIP2"
GOALS = {EFFICIENTNET: 0.90, SIGLIP2: 0.95}
NO_OP = ("no-op", "no-op, no decoding")


@dataclass(frozen=True)
class BenchTask(ShardTask):
    """A shard, and how to treat it."""

    kind: str = ""


class NoOp:
    """An encoder that answers at once, with features of the usual size."""

    channels, max_tokens, fingerprint = 1280, 64, ""

    def __init__(self) -> None:
        self._answer = EncodedImage(np.zeros((64, 1280), np.float32), (8, 8))

    def preprocess(self, image: Image.Image) -> dict[str, Any]:
        return {}

    def encode(self, batch: Sequence[dict[str, Any]]) -> list[EncodedImage]:
        return [self._answer] * len(batch)


class Undecoded(FeatureWorker):
    """The job's worker without looking at the pictures."""

    def _prepare(self, source: Shard, number: int) -> Any:
        return {}


class BenchWorker:
    """Lives in one actor; returns the CPU seconds a shard took in it."""

    def __init__(self, encoders: Mapping[str, EncoderConfig]) -> None:
        workers = dict(zip(NO_OP, (FeatureWorker, Undecoded), strict=True))
        self._work = {name: worker(NoOp(), BATCH, "float16", 1).process for name, worker in workers.items()}
        for name, config in encoders.items():
            encoder = build_encoder(config, "cpu")
            self._work[f"{name}, bare"] = partial(bare, encoder)
            self._work[f"{name}, job"] = FeatureWorker(encoder, BATCH, "float16", 1).process

    def process(self, task: BenchTask, count: Callable[[int], None]) -> float:
        start = time.process_time()
        self._work[task.kind](task, count)
        return time.process_time() - start


def bare(encoder: Encoder, task: BenchTask, count: Callable[[int], None]) -> None:
    """Decode, prepare and encode a shard in batches."""
    shard = Shard(task.source)
    for first in range(0, len(shard), BATCH):
        numbers = range(first, min(first + BATCH, len(shard)))
        pictures = [decode_image(shard.member(i, "webp"), shard.keys[i]) for i in numbers]
        encoder.encode([encoder.preprocess(picture) for picture in pictures])


def write_siglip2(folder: str) -> None:
    """A SigLIP2 of 4 layers of width 192 with random weights."""
    from transformers import Siglip2VisionConfig
    from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    shape = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3}
    Siglip2VisionModel(Siglip2VisionConfig(**shape)).save_pretrained(folder)


def others_cpu_s() -> float:
    """CPU seconds of this process and of Ray's processes, without the actors."""
    total = time.process_time()
    for process in psutil.Process().children(recursive=True):
        try:
            if "BenchWorker" not in process.name() and "_Actor" not in " ".join(process.cmdline()):
                used = process.cpu_times()
                total += used.user + used.system
        except psutil.NoSuchProcess:
            continue
    return total


def measure(
    encoders: Mapping[str, EncoderConfig], tasks: Sequence[BenchTask], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """CPU and wall seconds per picture of every kind and round."""
    share = Resources(workers=2, threads=1)
    images = sum(task.samples for task in tasks)

    def once(pool: ActorPool, kind: str) -> tuple[float, float]:
        before, start = others_cpu_s(), time.perf_counter()
        used = sum(seconds for _, seconds in pool.run([replace(t, kind=kind) for t in tasks], lambda _: None))
        elapsed, others = time.perf_counter() - start, others_cpu_s() - before
        return (used + (0 if kind.endswith("bare") else others)) / images, elapsed / images

    kinds = [f"{name}, {what}" for name in encoders for what in ("bare", "job")]
    with ray_session(share), ActorPool(partial(BenchWorker, encoders), share) as pool:
        return in_turn({kind: partial(once, pool, kind) for kind in (*kinds, *NO_OP)}, rounds)


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = {"path": folder, "limit": arguments.images, "shard_samples": SHARD, "held_out": 0.0}
        ingest.run(Config(name="bench", run_dir=folder, data=data))  # type: ignore[arg-type]
        make = partial(BenchTask, target=str(Path(folder) / "out.tar"), source_sha256="")
        tasks = [
            make(name=shard.name, source=str(Path(folder) / "train" / shard.name), samples=shard.samples)
            for shard in Manifest.read(Path(folder) / "train").shards
        ]
        tasks = [replace(task, target=str(Path(folder) / f"{task.name}.out.tar")) for task in tasks]
        assets = str(Path("assets/efficientnet-lite2").absolute())
        small = str(Path(folder) / "siglip2")
        write_siglip2(small)
        encoders = {
            EFFICIENTNET: EncoderConfig(kind="efficientnet-lite2", path=assets, batch=BATCH),
            SIGLIP2: EncoderConfig(kind="siglip2", path=small, max_patches=256, batch=BATCH),
        }
        found = measure(encoders, tasks, arguments.rounds)
    timings = {kind: Timing.of([cpu for cpu, _ in values]) for kind, values in found.items()}
    wall = {kind: Timing.of([seconds for _, seconds in values]) for kind, values in found.items()}
    rows = [
        [kind, f"{1e3 * t.median:.2f} ms", t.spread, f"{1 / wall[kind].median:.0f} /s"] for kind, t in timings.items()
    ]
    goals = [
        Goal(f"{name}: bare encoder / job", timings[f"{name}, bare"].median / timings[f"{name}, job"].median, bound)
        for name, bound in GOALS.items()
    ]
    figures = {"cpu_s_per_image": timings, "images_per_s_wall": {kind: 1 / t.median for kind, t in wall.items()}}
    columns = ["", "CPU time per picture", "range", "pictures (2 actors)"]
    return publish("bench_features", columns, rows, goals, figures, ("ray", "pillow", "transformers"))


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
