"""`unicom latents`: compress the features of a run with its trained compressor into latent tars, and their statistics.

Reads the features beside the images and the exported codec below `run_dir/weights`; writes un-normalised latents [m, d]
in float16 as `run_dir/latents/<set>/name-000000.latent.tar`. Mean and standard deviation of each channel over the
training set go to `run_dir/latents/stats.json` and into the codec's config.json. Runs on Ray actors as features do; so
little work that Ray's start would take longer is done in this process.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipelines.ledger import Ledger
from pipelines.parts import (
    PartSet,
    ShardResult,
    ShardTask,
    check_bad,
    check_room,
    further_sets,
    part_sets,
    reason_of,
    record,
    remove_leftovers,
    unfinished,
    write_manifest,
)
from pipelines.progress import JobProgress
from pipelines.ray_pool import ActorPool, ray_session, resources
from unicom_dist.config.errors import CheckpointError, DataError
from unicom_dist.config.schema import CodecConfig, Config
from unicom_dist.config.storage import reason
from unicom_dist.data.manifest import Manifest, latent_producer
from unicom_dist.data.npy import read_npy, to_tensor, write_npy
from unicom_dist.data.pairs import grid_of
from unicom_dist.data.samples import grid_positions
from unicom_dist.data.shardset import Sample
from unicom_dist.data.tar import Shard, ShardWriter, replace_file
from unicom_dist.models.codec import LatentStats
from unicom_dist.models.compressor import Compressor
from unicom_dist.models.encoders.base import fingerprint as fingerprint_of

log = logging.getLogger(__name__)
PART, FEATURES = "latent", "features"
SETS = ("train", "heldout")  # the prior reads these, and further sets; augmented views serve the codec
IMAGES_PER_WORKER = 512  # an actor for fewer costs more than it saves
STD_FLOOR = 1e-4  # a dead channel must not turn into infinities
DOCS = "docs/data.md"


class Features(NamedTuple):
    """What the encoder saw of one image."""

    tokens: Tensor  # [n, D] float32
    grid: tuple[int, int]
    about: dict[str, Any]  # the .json member


class LatentWorker:
    """Compresses feature shards. Lives in one actor."""

    def __init__(self, codec: Path, batch: int) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._compressor = load_compressor(codec).to(self._device)
        self._channels = int(_codec_config(codec)["encoder_channels"])
        self._batch = batch

    @torch.inference_mode()
    def process(self, task: ShardTask, count: Callable[[int], None]) -> ShardResult:
        """Compress one shard. Its sums (count, mean, squared deviations) come back for the statistics."""
        source = Shard(task.source)
        moments: list[tuple[int, Tensor, Tensor]] = []
        skipped: dict[str, str] = {}
        with ShardWriter(task.target) as writer:
            for start in range(0, len(source), self._batch):
                numbers = range(start, min(start + self._batch, len(source)))
                usable: list[tuple[str, Features]] = []
                for key, i in ((source.keys[i], i) for i in numbers):
                    try:
                        usable.append((key, self._read(key, source[i])))
                    except DataError as error:
                        skipped[key] = reason_of(error, key)
                for (key, item), latents in zip(usable, self._compress([item for _, item in usable]), strict=True):
                    half = latents.to(torch.float16)
                    if not bool(half.isfinite().all()):
                        skipped[key] = "latents are not finite in float16"
                        continue
                    about = {**item.about, "grid": self._compressor.config.latent_grid(item.grid)}
                    writer.write(key, {"latent.npy": write_npy(half.numpy()), "json": json.dumps(about).encode()})
                    rows = latents.double()
                    mean = rows.mean(0)
                    moments.append((len(rows), mean, (rows - mean).square().sum(0)))
                count(len(numbers))
        total, mean, moment = merge_moments(moments)
        sums = {"count": total, "mean": mean.tolist(), "moment": moment.tolist()}
        return ShardResult(writer.entry, skipped, sums)

    def _read(self, key: str, members: dict[str, memoryview]) -> Features:
        """The features of one image. DataError: damaged, not finite, not as many tokens or channels as they should."""
        grid = grid_of(Sample(key, {FEATURES: members}), FEATURES, "features.npy", self._channels)
        tokens = to_tensor(read_npy(members["features.npy"], key)).float()
        if not bool(tokens.isfinite().all()):
            raise DataError(f"{key}: the features hold values that are not finite")
        return Features(tokens, grid, json.loads(bytes(members["json"])))

    def _compress(self, images: Sequence[Features]) -> list[Tensor]:
        """Latents [m, d] float32 of each image, all end to end: nothing is padded."""
        if not images:
            return []
        tokens = torch.cat([image.tokens for image in images]).to(self._device)
        places = torch.cat([grid_positions(*image.grid) for image in images]).to(self._device)
        latents = self._compressor.packed(tokens, places, [math.prod(image.grid) for image in images]).float().cpu()
        return list(latents.split([math.prod(self._compressor.config.latent_grid(image.grid)) for image in images]))


def merge_moments(parts: Sequence[tuple[int, Tensor, Tensor]]) -> tuple[int, Tensor, Tensor]:
    """Count, mean [d] and sum of squared deviations [d] of the union, in float64. Ref: Chan, Golub, LeVeque 1979."""
    total, mean, moment = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for count, new_mean, new_moment in parts:
        if not count:
            continue
        delta = new_mean - mean
        moment = moment + new_moment + delta.square() * (total * count / (total + count))
        mean = mean + delta * (count / (total + count))
        total += count
    return total, mean, moment


def load_compressor(folder: Path) -> Compressor:
    """The compressor of an exported codec, in float32. CheckpointError: missing, damaged, of another shape."""
    config = _codec_config(folder)
    try:
        weights = load_file(folder / "model.safetensors")
        model = Compressor(CodecConfig(**config["codec"]).compressor, int(config["encoder_channels"]))
        prefix = "compressor."
        own = {name.removeprefix(prefix): w.float() for name, w in weights.items() if name.startswith(prefix)}
        model.load_state_dict(own)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} does not hold a usable codec", reason(error)[:200], "train the codec again", DOCS
        ) from error
    return model.eval().requires_grad_(False)


def _codec_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds no exported codec", reason(error), "train it: unicom train RECIPE --stage codec", DOCS
        ) from error
    return config


def build_worker(codec: Path, batch: int) -> LatentWorker:
    """The worker of an actor."""
    return LatentWorker(codec, batch)


def run(config: Config, on_state: Callable[[str], None] = lambda state: None) -> list[Manifest]:
    """Compress what is not compressed yet, write the statistics, and return the manifests.

    `on_state` is told "running" if there is something to compress, and "done".
    CheckpointError: no usable codec. DataError: no features, those of another encoder than the codec's, too many bad.
    PreflightError: as for features.
    """
    run_dir = Path(config.run_dir)
    stage = next((stage for stage in config.stages if stage.kind == "latents"), None)
    name = config.codec_before(stage) if stage else ""
    codec, target = run_dir / "weights" / (name or "codec"), run_dir / "latents"
    settings = _codec_config(codec)
    data = Path(config.data.path)
    sets = part_sets(data, [*SETS, *further_sets(config)], config.encoder.kind, PART, target)
    for part in sets:
        if part.manifest.fingerprint != settings.get("encoder_fingerprint"):
            raise DataError(
                f"{data / part.name}: features with fingerprint {part.manifest.fingerprint}",
                f"the codec was trained on {settings.get('encoder_fingerprint')}",
                f"run `unicom features run` with the codec's encoder, encoder.path={settings['encoder']['path']},"
                " or train the codec again",
                DOCS,
            )
    producer = latent_producer(codec / "model.safetensors", settings["encoder_fingerprint"])
    fingerprint = fingerprint_of(producer)
    with Ledger(target / "ledger.latent.jsonl") as ledger:
        remove_leftovers(sets)
        _forget_other_codecs(sets, ledger, fingerprint)
        todo = unfinished(sets, ledger, fingerprint)
        if todo:
            on_state("running")
            try:
                _compress_all(config, codec, sets, ledger, todo, fingerprint)
            finally:
                remove_leftovers(sets)
        manifests = [write_manifest(part, ledger, fingerprint, producer) for part in sets]
        images = sum(task.samples for part in sets for task in part.tasks)
        check_bad(config.data.max_bad_fraction, manifests, images, "run `unicom features run` again")
        measured = _statistics(sets, config.data.pairs, ledger)
    stats = measured if config.codec.latent_scale == "channel" else measured.shared()
    replace_file(target / "stats.json", (json.dumps(stats.to_json(), indent=1) + "\n").encode())
    if settings.get("stats") != stats.to_json():
        settings["stats"] = stats.to_json()
        replace_file(codec / "config.json", (json.dumps(settings, indent=2) + "\n").encode())
    on_state("done")
    for part, manifest in zip(sets, manifests, strict=True):
        state = "written" if any(task in part.tasks for task in todo) else "already there"
        log.info("%s: latents of %d images, %.1f MB, %s", part.name, manifest.samples, manifest.bytes / 1e6, state)
    std = measured.std
    log.info("latents: %d channels, std %.3g to %.3g", len(std), float(std.min()), float(std.max()))
    return manifests


def _compress_all(
    config: Config, codec: Path, sets: Sequence[PartSet], ledger: Ledger, todo: list[ShardTask], fingerprint: str
) -> None:
    images = sum(task.samples for task in todo)
    needed = sum(Path(task.source).stat().st_size for task in todo)  # latents are narrower than features
    check_room(sets, needed)
    share = resources(config.features.workers, math.ceil(images / IMAGES_PER_WORKER))
    log.info("latents: %d images to compress, %d workers", images, share.workers)
    build = partial(build_worker, codec, config.encoder.batch)
    with ExitStack() as stack:
        progress = stack.enter_context(JobProgress("latents", images))
        finished = 0

        def show(running: int) -> None:
            progress.update(finished + running)

        if share.workers > 1:
            stack.enter_context(ray_session(share))
            results = stack.enter_context(ActorPool(build, share)).run(todo, show)
        else:
            worker = build()
            results = ((task, worker.process(task, lambda _: None)) for task in todo)
        for task, result in results:
            record(ledger, task, result, fingerprint, str(codec))
            finished += task.samples
            progress.update(finished)


def _forget_other_codecs(sets: Sequence[PartSet], ledger: Ledger, fingerprint: str) -> None:
    """Latents of an earlier codec of this run are of no use to anybody: they are removed, and that is said."""
    for part in sets:
        for task in part.tasks:
            entry = ledger.done.get(task.name)
            if entry and entry["fingerprint"] != fingerprint:
                if Path(task.target).is_file():
                    log.info("%s: made by an earlier codec, made again", task.name)
                    Path(task.target).unlink()
                del ledger.done[task.name]
        manifest = Manifest.file(part.folder, PART)
        if manifest.is_file() and Manifest.read(part.folder, PART).fingerprint != fingerprint:
            manifest.unlink()


def _statistics(sets: Sequence[PartSet], pairs: Sequence[str], ledger: Ledger) -> LatentStats:
    """Per-channel mean and std over the training pairs, shard sums merged in shard order."""
    sums = [ledger.done[task.name]["extra"] for part in sets if part.name in pairs for task in part.tasks]
    count, mean, moment = merge_moments([(s["count"], _double(s["mean"]), _double(s["moment"])) for s in sums])
    if not count:
        raise DataError("there is no latent to take statistics of", "every image was skipped", "check the codec", DOCS)
    return LatentStats(mean.float(), (moment / count).sqrt().clamp_min(STD_FLOOR).float())


def _double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
