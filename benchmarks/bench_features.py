"""The feature job on Ray against the bare encoder in a loop, on the same cores and pictures.

Two actors run either the job's worker (read the shard, decode on threads, encode, write a feature tar) or the bare loop
(decode, prepare, encode, drop the result), in turn. The clock is CPU time per picture: of the actors for the loop; of
the actors, the driver and every process of Ray for the job. `no-op` is the job with an encoder that computes nothing:
what the job itself costs per picture, with the decoding and without it.

    python benchmarks/bench_features.py [--images 256] [--rounds 5]

Uses assets/efficientnet-lite2 and assets/fluent-emoji (`unicom data fetch`).
"""

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.tar import Shard
from unicom_dist.models.encoders import EncodedImage, build_encoder

ENCODER = EncoderConfig(kind="efficientnet-lite2", path=str(Path("assets/efficientnet-lite2").absolute()), batch=16)
SHARD = 32
KINDS = ("bare", "job", "no-op", "no-op, no decoding")


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

    def __init__(self) -> None:
        self._encoder = build_encoder(ENCODER, "cpu")
        self._workers = {
            "job": FeatureWorker(self._encoder, ENCODER.batch, "float16", 1),
            "no-op": FeatureWorker(NoOp(), ENCODER.batch, "float16", 1),
            "no-op, no decoding": Undecoded(NoOp(), ENCODER.batch, "float16", 1),
        }

    def process(self, task: BenchTask, count: Callable[[int], None]) -> float:
        start = time.process_time()
        if task.kind == "bare":
            self._bare(task.source)
        else:
            self._workers[task.kind].process(task, count)
        return time.process_time() - start

    def _bare(self, path: str) -> None:
        shard = Shard(path)
        for first in range(0, len(shard), ENCODER.batch):
            pictures = [shard.member(i, "webp") for i in range(first, min(first + ENCODER.batch, len(shard)))]
            images = [Image.open(io.BytesIO(content)).convert("RGB") for content in pictures]
            self._encoder.encode([self._encoder.preprocess(image) for image in images])


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


def measure(tasks: Sequence[BenchTask], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """CPU and wall seconds per picture of every kind and round."""
    share = Resources(workers=2, threads=1)
    images = sum(task.samples for task in tasks)

    def once(pool: ActorPool, kind: str) -> tuple[float, float]:
        before, start = others_cpu_s(), time.perf_counter()
        used = sum(seconds for _, seconds in pool.run([replace(t, kind=kind) for t in tasks], lambda _: None))
        elapsed, others = time.perf_counter() - start, others_cpu_s() - before
        return (used + (0 if kind == "bare" else others)) / images, elapsed / images

    with ray_session(share), ActorPool(BenchWorker, share) as pool:
        return in_turn({kind: partial(once, pool, kind) for kind in KINDS}, rounds)


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
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
        found = measure(tasks, arguments.rounds)
    timings = {kind: Timing.of([cpu for cpu, _ in values]) for kind, values in found.items()}
    wall = {kind: Timing.of([seconds for _, seconds in values]) for kind, values in found.items()}
    rows = [
        [kind, f"{1e3 * t.median:.2f} ms", t.spread, f"{1 / wall[kind].median:.0f} /s"] for kind, t in timings.items()
    ]
    ratio = timings["bare"].median / timings["job"].median
    goals = [Goal("job against bare encoder", ratio, 0.90)]
    figures = {"cpu_s_per_image": timings, "images_per_s_wall": {kind: 1 / t.median for kind, t in wall.items()}}
    columns = ["", "CPU time per picture", "range", "pictures (2 actors)"]
    return publish("bench_features", columns, rows, goals, figures, ("ray", "pillow"))


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
