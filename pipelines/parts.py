"""What features and latents share: which shards of a set are still to be made, and the manifest when all are.

A shard of a part is finished when the ledger says so for the same producer and the same images, and the file has the
size noted there. Sets are the folders train/, augmented/ and heldout/ below `data.path`, and those of `data.sets`.
"""

import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.ledger import Entry, Ledger, read_ledger
from unicom_dist.config.errors import DataError, PreflightError
from unicom_dist.config.schema import Config
from unicom_dist.config.storage import make_folder
from unicom_dist.data.decode import IMAGE_EXTENSIONS
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.shardset import ShardSet, part_name
from unicom_dist.data.tar import ShardEntry

DOCS = "docs/data.md"
SETS = ("train", "augmented", "heldout")


def further_sets(config: Config) -> list[str]:
    """The sets beside train whose samples have images of their own. DataError: a damaged shard."""
    root = Path(config.data.path)
    there = [name for name in config.data.further_sets if Manifest.file(root / name).is_file()]
    return [name for name in there if _has_images(ShardSet(root / name))]


def _has_images(samples: ShardSet) -> bool:
    return len(samples) > 0 and any(extension in samples[0].parts[""] for extension in IMAGE_EXTENSIONS)


@dataclass(frozen=True)
class ShardTask:
    """One shard of a part: read `source`, write `target`."""

    name: str  # set/shard, as in the ledger
    source: str
    target: str
    samples: int
    source_sha256: str


@dataclass(frozen=True)
class ShardResult:
    """What a worker made."""

    entry: ShardEntry
    skipped: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # what the job adds up over shards; goes into the ledger


@dataclass
class PartSet:
    """One set of a part: its source manifest, where the part goes, and its shards in order."""

    name: str
    manifest: Manifest
    folder: Path
    part: str
    tasks: list[ShardTask]


def part_sets(data: Path, names: Sequence[str], source_part: str, part: str, target: Path) -> list[PartSet]:
    """The existing sets of `names`, with a task per shard of `source_part`; parts go to `target`/<set>.

    DataError if there is none of them, or a set's source is unfinished.
    """
    sets = []
    for name in names:
        folder = data / name
        if not Manifest.file(folder).is_file():
            continue
        images = Manifest.read(folder)
        manifest = Manifest.read(folder, source_part) if source_part else images
        sources = {shard.name: shard for shard in manifest.shards}
        tasks = []
        for base in images.shards:
            shard = sources.get(part_name(base.name, source_part))
            if shard is None:
                raise DataError(
                    f"{folder}: {base.name} has no {source_part!r} part",
                    "the images were ingested again after it was computed",
                    "run `unicom features run`",
                    DOCS,
                )
            file = target / name / part_name(base.name, part)
            label = f"{name}/{base.name.removesuffix('.tar')}"
            tasks.append(ShardTask(label, str(folder / shard.name), str(file), shard.samples, shard.sha256))
        sets.append(PartSet(name, manifest, target / name, part, tasks))
    if not sets:
        raise DataError(
            f"{data} holds no shard set", f"none of {', '.join(names)} has a manifest", "run unicom data ingest", DOCS
        )
    return sets


def unfinished(sets: Sequence[PartSet], ledger: Ledger, fingerprint: str) -> list[ShardTask]:
    """The tasks still to be done, largest first so that the actors end together.

    DataError if shards are there that another producer made.
    """
    todo = []
    for task in itertools.chain.from_iterable(part.tasks for part in sets):
        entry = ledger.done.get(task.name)
        target = Path(task.target)
        if entry and target.is_file() and entry["fingerprint"] != fingerprint:
            alike = f"{target.parent.parent}/*/*.{target.name.split('.')[-2]}.tar"
            raise DataError(
                f"{target} has fingerprint {entry['fingerprint']}, this configuration's is {fingerprint}",
                f"it was made by something else: {entry.get('producer', 'unknown')}",
                f"configure what it was made with, or remove {alike}",
                DOCS,
            )
        if not is_finished(task, entry, fingerprint):
            todo.append(task)
    return sorted(todo, key=lambda task: -task.samples)


def is_finished(task: ShardTask, entry: Entry | None, fingerprint: str) -> bool:
    """Whether the shard of `task` is there as the ledger describes it."""
    target = Path(task.target)
    return (
        entry is not None
        and entry["fingerprint"] == fingerprint
        and entry["source_sha256"] == task.source_sha256
        and target.is_file()
        and target.stat().st_size == entry["bytes"]
    )


def record(ledger: Ledger, task: ShardTask, result: ShardResult, fingerprint: str, producer: str) -> None:
    """Note a finished shard."""
    ledger.add(
        task.name,
        "done",
        fingerprint=fingerprint,
        producer=producer,
        source_sha256=task.source_sha256,
        samples=result.entry.samples,
        bytes=result.entry.bytes,
        sha256=result.entry.sha256,
        skipped=result.skipped,
        **({"extra": result.extra} if result.extra else {}),
    )


def write_manifest(part: PartSet, ledger: Ledger, fingerprint: str, producer: dict[str, Any]) -> Manifest:
    """The manifest of a finished set, from the ledger; rewritten only if it differs from the one there."""
    shards: list[ShardEntry] = []
    skipped: dict[str, str] = {}
    for task in part.tasks:
        entry = ledger.done[task.name]
        shards.append(ShardEntry(Path(task.target).name, entry["samples"], entry["bytes"], entry["sha256"]))
        skipped |= entry["skipped"]
    manifest = Manifest(part=part.part, fingerprint=fingerprint, producer=producer, shards=shards, skipped=skipped)
    manifest.write(part.folder)
    return manifest


def remove_leftovers(sets: Sequence[PartSet]) -> None:
    """Delete what killed writers left under temporary names. Only while holding the ledger."""
    for part in sets:
        for stale in part.folder.glob(f"*.{part.part}.tar*.tmp"):
            stale.unlink(missing_ok=True)


def check_room(sets: Sequence[PartSet], needed: int) -> None:
    """PreflightError if the folders cannot be written or have less than `needed` bytes free."""
    for part in sets:
        make_folder(part.folder)
    free = shutil.disk_usage(sets[0].folder).free
    if free < needed:
        raise PreflightError(
            f"{sets[0].folder}: {free / 1e9:.2f} GB free",
            f"the {sets[0].part!r} shards still to be made may need {needed / 1e9:.2f} GB",
            "free space, or set data.path to a larger disk",
            DOCS,
        )


def check_bad(allowed: float, manifests: Sequence[Manifest], total: int, remedy: str) -> None:
    """DataError if more than the share `allowed` (data.max_bad_fraction) of `total` images was left out."""
    skipped = {key: reason for manifest in manifests for key, reason in manifest.skipped.items()}
    if len(skipped) > allowed * total:
        some = "; ".join(f"{key}: {reason}" for key, reason in itertools.islice(skipped.items(), 3))
        raise DataError(
            f"{len(skipped)} of {total} images could not be used, data.max_bad_fraction = {allowed}",
            some,
            f"{remedy}, or raise data.max_bad_fraction",
            DOCS,
        )


def reason_of(error: DataError, key: str) -> str:
    """Why a sample is left out, in a line for the manifest that names it anyway."""
    return ": ".join(filter(None, (error.what.removeprefix(f"{key}: "), error.why)))


def progress_rows(sets: Sequence[PartSet], ledger_file: Path, fingerprint: str) -> Iterator[dict[str, Any]]:
    """One row per set: shards done, shards in all, samples done."""
    done = read_ledger(ledger_file)
    for part in sets:
        finished = [task for task in part.tasks if is_finished(task, done.get(task.name), fingerprint)]
        yield {
            "set": part.name,
            "done": len(finished),
            "shards": len(part.tasks),
            "samples": sum(done[task.name]["samples"] for task in finished),
        }
