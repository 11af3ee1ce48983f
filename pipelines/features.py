"""`unicom features`: encode the shards of a recipe into feature tars joined by key, on Ray actors.

Each actor holds one encoder and turns one shard of pictures into one shard of features [n, D]; decoding runs on threads
beside the encoder. The driver alone writes the ledger and, at the end, the manifests. A picture that cannot be read
is left out, counted and named.
"""

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.ledger import Ledger
from pipelines.parts import (
    SETS,
    PartSet,
    ShardResult,
    ShardTask,
    check_bad,
    check_room,
    further_sets,
    part_sets,
    progress_rows,
    reason_of,
    record,
    remove_leftovers,
    unfinished,
    write_manifest,
)
from pipelines.progress import JobProgress
from pipelines.ray_pool import ActorPool, Resources, ray_session, resources
from unicom_dist.config.errors import DataError
from unicom_dist.config.schema import Config, EncoderConfig
from unicom_dist.data.decode import IMAGE_EXTENSIONS, decode_image
from unicom_dist.data.manifest import Manifest, sha256_of
from unicom_dist.data.npy import write_npy
from unicom_dist.data.tar import Shard, ShardWriter
from unicom_dist.models.encoders import Encoder, build_encoder, encoder_fingerprint, encoder_shape, fetch_encoder

log = logging.getLogger(__name__)
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


class FeatureWorker:
    """Encodes shards. Lives in one actor."""

    def __init__(self, encoder: Encoder, batch: int, dtype: str, threads: int) -> None:
        self._encoder, self._batch, self._dtype = encoder, batch, dtype
        self._decoders = ThreadPoolExecutor(max(threads, 1))

    def process(self, task: ShardTask, count: Callable[[int], None]) -> ShardResult:
        """Encode one shard; `count` is told after every batch."""
        source = Shard(task.source)
        skipped: dict[str, str] = {}
        with ShardWriter(task.target) as writer:
            for prepared in self._prepared(source):
                usable = [(key, item) for key, item in prepared if not isinstance(item, str)]
                encoded = self._encoder.encode([item for _, item in usable]) if usable else []
                results = dict(zip((key for key, _ in usable), encoded, strict=True))
                for key, item in prepared:
                    if isinstance(item, str):
                        skipped[key] = item
                        continue
                    features, grid = results[key]
                    stored = store_as(features, self._dtype)
                    if stored is None:
                        skipped[key] = f"features are not finite in {self._dtype}"
                        continue
                    members = {"features.npy": write_npy(stored), "json": json.dumps({"grid": list(grid)}).encode()}
                    writer.write(key, members)
                count(len(prepared))
        return ShardResult(writer.entry, skipped)

    def _prepared(self, source: Shard) -> Iterator[list[tuple[str, Any]]]:
        """Batches of (key, arrays or the reason why there are none), decoded one batch ahead of the encoder."""
        waiting: deque[list[tuple[str, Future[Any]]]] = deque()
        for numbers in _batches(len(source), self._batch):
            waiting.append([(source.keys[i], self._decoders.submit(self._prepare, source, i)) for i in numbers])
            if len(waiting) > 1:
                yield [(key, future.result()) for key, future in waiting.popleft()]
        while waiting:
            yield [(key, future.result()) for key, future in waiting.popleft()]

    def _prepare(self, source: Shard, number: int) -> Any:
        members = source[number]
        content = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
        if content is None:
            return "no image"
        try:
            return self._encoder.preprocess(decode_image(content, source.keys[number]))
        except DataError as error:
            return reason_of(error, source.keys[number])


def _batches(total: int, size: int) -> Iterator[range]:
    for start in range(0, total, size):
        yield range(start, min(start + size, total))


def store_as(features: NDArray[np.float32], dtype: str) -> NDArray[Any] | None:
    """`features` in the stored precision (bfloat16 as two-byte records), or None if something in them is not finite."""
    if dtype == "bfloat16":
        import torch

        tensor = torch.from_numpy(np.ascontiguousarray(features)).to(torch.bfloat16)
        return tensor.view(torch.int16).numpy().view("V2") if bool(tensor.isfinite().all()) else None
    with np.errstate(over="ignore"):
        stored = features.astype(dtype)
    return stored if np.isfinite(stored).all() else None


def build_worker(config: EncoderConfig, dtype: str, threads: int) -> FeatureWorker:
    """The worker of an actor; its encoder takes the actor's GPU if it has one."""
    return FeatureWorker(build_encoder(config), config.batch, dtype, threads)


def run(config: Config) -> list[Manifest]:
    """Encode what is not encoded yet and return the manifests of all sets.

    ConfigError: wrong encoder folder, hub out of reach. DataError: no shards, features of another encoder there, too
    many bad pictures. PreflightError: cannot write, too little space, workers killed again and again.
    """
    fetch_encoder(config.encoder)  # once and here: the actors then find it
    sets, fingerprint, kind = _sets(config), encoder_fingerprint(config.encoder), config.encoder.kind
    with Ledger(_ledger(config)) as ledger:
        remove_leftovers(sets)
        todo = unfinished(sets, ledger, fingerprint)
        total = sum(task.samples for part in sets for task in part.tasks)
        left = sum(task.samples for task in todo)
        producer = _producer(config)
        if todo:
            tokens, channels = encoder_shape(config.encoder)
            check_room(sets, left * (tokens * channels * ITEM_BYTES[config.features.dtype] + 2048))
            share = resources(config.features.workers, len(todo), use_gpus=kind != "random")
            device = f"{share.gpus * share.workers} GPUs" if share.gpus else f"{share.threads} threads each"
            log.info("%s", producer["encoder"])
            log.info("features: %d of %d images to encode, %d workers, %s", left, total, share.workers, device)
            try:
                _encode(config, ledger, todo, share, fingerprint, producer, (total - left, total))
            finally:
                remove_leftovers(sets)  # the actors are gone; what they had not finished goes, too
        manifests = [write_manifest(part, ledger, fingerprint, producer) for part in sets]
        check_bad(config.data.max_bad_fraction, manifests, total, "ingest the source again")
    for part, manifest in zip(sets, manifests, strict=True):
        state = "written" if any(task in part.tasks for task in todo) else "already there"
        skipped = f", {len(manifest.skipped)} skipped" if manifest.skipped else ""
        text = "%s: features of %d images in %d shards, %.1f MB, %s%s"
        log.info(text, part.name, manifest.samples, len(manifest.shards), manifest.bytes / 1e6, state, skipped)
    return manifests


def _encode(
    config: Config,
    ledger: Ledger,
    todo: list[ShardTask],
    share: Resources,
    fingerprint: str,
    producer: dict[str, Any],
    span: tuple[int, int],
) -> None:
    """Run the tasks. `span`: images done before, images in all."""
    done, total = span
    build = partial(build_worker, config.encoder, config.features.dtype, share.threads)
    start = time.monotonic()
    with ray_session(share), ActorPool(build, share) as pool, JobProgress("features", total, start=done) as progress:
        finished = done

        def show(running: int) -> None:
            progress.update(finished + running)

        for task, result in pool.run(todo, show):
            record(ledger, task, result, fingerprint, producer["encoder"])
            finished += task.samples
            progress.update(finished)
    seconds = time.monotonic() - start
    log.info("features: %d images in %.1f s with Ray's start (%.1f/s)", total - done, seconds, (total - done) / seconds)


def status(config: Config) -> list[dict[str, Any]]:
    """One row per set: shards done, of how many, images done."""
    return list(progress_rows(_sets(config), _ledger(config), encoder_fingerprint(config.encoder)))


def verify(config: Config) -> list[str]:
    """Read every feature tar: whole, the manifest's bytes, the keys of its images, finite values. Problems found."""
    from unicom_dist.data.npy import read_npy, to_tensor

    problems = []
    for part in _sets(config):
        manifest = Manifest.read(part.folder, part.part)
        if manifest.fingerprint != encoder_fingerprint(config.encoder):
            problems.append(f"{part.name}: fingerprint {manifest.fingerprint} is not the configured encoder's")
        for task, entry in zip(part.tasks, manifest.shards, strict=False):
            try:
                shard = Shard(task.target)
                expected = [key for key in Shard(task.source).keys if key not in manifest.skipped]
                if sha256_of(Path(task.target)) != entry.sha256:
                    problems.append(f"{task.name}: contents differ from the manifest's sha256")
                if shard.keys != expected:
                    problems.append(f"{task.name}: its keys are not those of the images")
                for number, key in enumerate(shard.keys):
                    if not bool(to_tensor(read_npy(shard.member(number, "features.npy"), key)).isfinite().all()):
                        problems.append(f"{task.name}: {key} is not finite")
            except DataError as error:
                problems.append(f"{task.name}: {error.what}")
        log.info("%s: %d shards read", part.name, len(manifest.shards))
    return problems


def _sets(config: Config) -> list[PartSet]:
    data = Path(config.data.path)
    return part_sets(data, [*SETS, *further_sets(config)], "", config.encoder.kind, data)


def _ledger(config: Config) -> Path:
    return Path(config.data.path) / f"ledger.{config.encoder.kind}.jsonl"


def _producer(config: Config) -> dict[str, Any]:
    tokens, channels = encoder_shape(config.encoder)
    names = {
        "efficientnet-lite2": "EfficientNet-lite2 (supervised ImageNet, a stand-in for SigLIP2)",
        "siglip2": f"SigLIP2 NaFlex ({config.encoder.path})",
        "random": "random linear map (for tests, no semantics)",
    }
    return {
        "encoder": f"{names[config.encoder.kind]}, up to {tokens} tokens of {channels} channels",
        "dtype": config.features.dtype,
        **config.encoder.model_dump(exclude={"batch"}),
    }
