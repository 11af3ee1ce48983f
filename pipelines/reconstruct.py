"""`unicom sample --reconstruct FOLDER`: every picture below a folder, or in its tars, encoded and decoded into a PNG.

The outputs have the pictures' names below the output folder. A picture's seed follows from its name and the seed given,
so that it does not depend on its neighbours or on the number of workers. What exists is not made again; a picture that
cannot be read is left out and named. The ledger says what model and settings made the folder: others are refused.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image

from pipelines.ledger import Ledger
from pipelines.parts import reason_of
from pipelines.picture_list import DOCS, SHEET, Picture, list_pictures
from pipelines.progress import JobProgress
from pipelines.ray_pool import ActorPool, ray_session, resources
from unicom_dist.config.errors import DataError
from unicom_dist.data.encode import png_bytes
from unicom_dist.data.tar import replace_file
from unicom_dist.models.encoders.base import weights_digest
from unicom_dist.models.encoders.crop import crop_to_ratio
from unicom_dist.sample.grid import picture_grid
from unicom_dist.sample.loading import find_parts
from unicom_dist.sample.pipeline import UniComPipeline

log = logging.getLogger(__name__)
LEDGER = "ledger.reconstruct.jsonl"
SHOWN = 24  # pictures on the sheet
AT_ONCE = 128  # pictures per task


@dataclass(frozen=True)
class Settings:
    """What the pictures depend on besides the model."""

    seed: int = 0
    decoder_steps: int = 8
    solver: str = "euler"
    guidance: float = 1.0


@dataclass(frozen=True)
class Chunk:
    """Pictures that one worker takes together."""

    name: str
    pictures: tuple[Picture, ...]


@dataclass
class Summary:
    """What was made and what was left out, {name: reason}."""

    made: int = 0
    existing: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


class ReconstructWorker:
    """Reconstructs chunks with one model. Lives in one actor, or in the job's own process."""

    def __init__(self, model: str, batch: int, settings: Settings) -> None:
        self._pipeline = UniComPipeline.from_pretrained(model, batch=batch)
        self._batch, self._settings = batch, settings

    def process(self, chunk: Chunk, count: Callable[[int], None]) -> dict[str, str]:
        """Write the chunk's PNGs; {name: reason} of what cannot be read."""
        skipped: dict[str, str] = {}
        for start in range(0, len(chunk.pictures), self._batch):
            some = chunk.pictures[start : start + self._batch]
            originals: list[tuple[Picture, Image.Image]] = []
            for picture in some:
                try:
                    image = picture.read()
                    if self._pipeline.buckets.aspect:
                        crop_to_ratio(image)  # refuses what is too long
                    originals.append((picture, image))
                except DataError as error:
                    skipped[picture.name] = reason_of(error, picture.name)
            self._draw(originals)
            count(len(some))
        return skipped

    def _draw(self, originals: Sequence[tuple[Picture, Image.Image]]) -> None:
        settings = self._settings
        seeds = [seed_of(settings.seed, picture.name) for picture, _ in originals]
        images = [image for _, image in originals]
        drawn = self._pipeline.reconstruct(
            images, seeds, settings.decoder_steps, settings.solver, guidance=settings.guidance
        )
        for (picture, _), seed, result in zip(originals, seeds, drawn, strict=True):
            replace_file(Path(picture.target), png_bytes(result, {"source": picture.name, "seed": seed}))


def seed_of(seed: int, name: str) -> int:
    """The seed of a picture, 63 bits, from the seed given and its name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


def build_worker(model: str, batch: int, settings: Settings) -> ReconstructWorker:
    """The worker of an actor."""
    return ReconstructWorker(model, batch, settings)


def run(
    model: str | Path,
    source: str | Path,
    out: Path,
    settings: Settings,
    batch: int = 32,
    workers: int = 1,
    limit: int = 0,
) -> Summary:
    """Reconstruct what is not there yet and draw the sheet.

    workers: Ray actors, 1 = this process alone. ConfigError and DataError as `list_pictures`; DataError: the folder
    holds reconstructions of another model or other settings, no picture could be read. CheckpointError: no model.
    """
    pictures, skipped = list_pictures(source, out, limit)
    identity = {"model": fingerprint_of(model), **asdict(settings)}
    with Ledger(out / LEDGER) as ledger:
        _check_identity(ledger, identity, out)
        todo = [picture for picture in pictures if not Path(picture.target).is_file()]
        summary = Summary(existing=len(pictures) - len(todo), skipped=skipped)
        for chunk, bad in _results(str(model), todo, settings, batch, workers):
            ledger.add(chunk.name, "done", identity=identity, pictures=len(chunk.pictures), skipped=bad)
            summary.skipped |= bad
            summary.made += len(chunk.pictures) - len(bad)
    for name, reason in summary.skipped.items():
        log.warning("left out: %s: %s", name, reason)
    there = [picture for picture in pictures if picture.name not in summary.skipped]
    if not there:
        some = next(iter(summary.skipped.items()))
        raise DataError(
            f"--reconstruct {source}: none of {len(pictures)} pictures can be read",
            f"{some[0]}: {some[1]}",
            "name a folder of readable pictures",
            DOCS,
        )
    _sheet(there, out)
    log.info(
        "%s: %d pictures reconstructed, %d were there, %d left out",
        out,
        summary.made,
        summary.existing,
        len(summary.skipped),
    )
    return summary


def fingerprint_of(model: str | Path) -> str:
    """Digest of the codec's weights in a run directory or model folder. CheckpointError: there is none."""
    return weights_digest(list(find_parts(model).codec.glob("*.safetensors")))[:32]


def _check_identity(ledger: Ledger, identity: dict[str, object], out: Path) -> None:
    for entry in ledger.done.values():
        other = entry.get("identity", {})
        differing = [f"{name} was {other.get(name)!r}, now {value!r}" for name, value in identity.items()]
        differing = [text for text, name in zip(differing, identity, strict=True) if other.get(name) != identity[name]]
        if differing:
            raise DataError(
                f"{out} holds reconstructions of another model or other settings",
                "; ".join(differing),
                "name another folder with --out, or remove this one",
                DOCS,
            )


def _results(
    model: str, todo: Sequence[Picture], settings: Settings, batch: int, workers: int
) -> Iterator[tuple[Chunk, dict[str, str]]]:
    """Each chunk with what was left out of it, as they finish."""
    if not todo:
        return
    share = resources(workers, len(todo))
    size = max(min(AT_ONCE, -(-len(todo) // share.workers)), 1)
    cut = [tuple(todo[start : start + size]) for start in range(0, len(todo), size)]
    chunks = [Chunk(f"{pictures[0].name} and {len(pictures) - 1} more", pictures) for pictures in cut]
    build = partial(build_worker, model, batch, settings)
    with ExitStack() as stack:
        progress = stack.enter_context(JobProgress("reconstruct", len(todo), "pictures"))
        finished = 0

        def show(running: int) -> None:
            progress.update(finished + running)

        if share.workers > 1:
            stack.enter_context(ray_session(share))
            results = stack.enter_context(ActorPool(build, share)).run(chunks, show)
        else:
            worker = build()
            results = ((chunk, worker.process(chunk, lambda _: None)) for chunk in chunks)
        for chunk, skipped in results:
            finished += len(chunk.pictures)
            progress.update(finished)
            yield chunk, skipped


def _sheet(pictures: Sequence[Picture], out: Path) -> None:
    """Originals beside what became of them, spread evenly over the folder."""
    count = min(SHOWN, len(pictures))
    chosen = [pictures[number * len(pictures) // count] for number in range(count)]
    both: list[Image.Image] = []
    labels: list[str] = []
    for picture in chosen:
        with suppress(DataError), Image.open(picture.target) as drawn:  # an original may have been damaged since
            both += [picture.read(), drawn.convert("RGB")]
            labels += [picture.name, "reconstructed"]
    if not both:
        return
    replace_file(out / SHEET, png_bytes(picture_grid(both, labels, columns=8 if len(both) > 6 else 2)))
    log.info("%d of them beside their originals: %s", count, out / SHEET)
