"""`unicom generate`: every prompt of a file drawn, as PNGs or as WebDataset tars, on Ray actors.

An output has the prompt's name and its number, and appears whole or not at all; what is there is not made again. After
any kill the next run makes what is missing, so that in the end there is exactly one for each. Seeds follow from the
prompt's name: a picture depends neither on its neighbours nor on the number of workers. The ledger says what model,
prompts and settings made the folder: others are refused.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipelines.ledger import Ledger
from pipelines.picture_worker import Settings, Task, Wanted, build_worker, picture_file
from pipelines.progress import JobProgress
from pipelines.prompts import DOCS, Prompts, read_prompts
from pipelines.ray_pool import ActorPool, Worker, ray_session, resources
from unicom_dist.config.errors import CheckpointError, DataError
from unicom_dist.data.tar import replace_file
from unicom_dist.models.encoders.base import weights_digest
from unicom_dist.sample.loading import find_parts

log = logging.getLogger(__name__)
LEDGER = "ledger.generate.jsonl"
INDEX = "index.jsonl"
IDENTITY = "settings"  # the ledger's entry that says what makes the folder
AT_ONCE = 64  # pictures per task, where each is a file of its own
Form = Literal["files", "tars"]


@dataclass
class Summary:
    """Pictures made, pictures that were there, and {row or picture: reason} of what was left out."""

    made: int
    existing: int
    skipped: dict[str, str]


def run(
    model: str | Path,
    prompts: Path,
    out: Path,
    settings: Settings,
    form: Form = "files",
    batch: int = 16,
    workers: int = 0,
    stage: str = "",
    column: str = "prompt",
    shard_samples: int = 256,
) -> Summary:
    """Draw what is not there yet and write index.jsonl.

    workers: Ray actors, 1 = this process alone, 0 = one per GPU, or per core without. shard_samples: pictures a tar.
    ConfigError and DataError as `read_prompts`; DataError: the folder was made by another model, other prompts or
    settings; nothing could be drawn. CheckpointError: no model, or one without a prior.
    """
    rows, out = read_prompts(prompts, column), out.resolve()
    for name, reason in rows.bad.items():
        log.warning("%s: left out: %s: %s", prompts, name, reason)
    fingerprint = model_fingerprint(model, stage)
    identity = {
        "model": fingerprint,
        "prompts": f"{len(rows.rows)} prompts of digest {rows.digest}",
        **asdict(settings),
    }
    identity |= {"format": form, **({"shard_samples": shard_samples} if form == "tars" else {})}
    identity = json.loads(json.dumps(identity))  # as the ledger gives it back: tuples are lists
    pictures = wanted_pictures(rows, settings)
    with Ledger(out / LEDGER) as ledger:
        _check_identity(ledger, identity, out)
        _remove_leftovers(out)
        skipped = {key: why for entry in ledger.done.values() for key, why in entry.get("skipped", {}).items()}
        tasks = _tar_tasks(out, pictures, shard_samples, ledger) if form == "tars" else None
        if tasks is None:
            left = [item for item in pictures if item.key not in skipped and not picture_file(out, item).is_file()]
            tasks = _file_tasks(out, left, workers)
        todo = sum(len(task.pictures) for task in tasks)
        before = len(skipped)
        build = partial(build_worker, str(Path(model).resolve()), stage, batch, settings, fingerprint)
        try:
            for task, bad in _results(build, tasks, workers, len(pictures) - todo, len(pictures)):
                size = Path(task.target).stat().st_size if form == "tars" else 0
                ledger.add(task.name, "done", pictures=len(task.pictures), skipped=bad, bytes=size)
                skipped |= bad
        finally:
            _remove_leftovers(out)  # the actors are gone; what killed ones had not finished goes, too
        _write_index(out, [item for item in pictures if item.key not in skipped], form, shard_samples, pictures)
    for name, reason in skipped.items():
        log.warning("left out: %s: %s", name, reason)
    if len(skipped) == len(pictures):
        some = next(iter(skipped.items()))
        raise DataError(f"{prompts}: nothing could be drawn", f"{some[0]}: {some[1]}", "write other prompts", DOCS)
    summary = Summary(todo - (len(skipped) - before), len(pictures) - todo - before, rows.bad | skipped)
    text = "%s: %d pictures drawn, %d were there, %d rows or pictures left out"
    log.info(text, out, summary.made, summary.existing, len(summary.skipped))
    return summary


def wanted_pictures(prompts: Prompts, settings: Settings) -> list[Wanted]:
    """Every picture of a file of prompts, in its order."""
    return [
        Wanted(f"{row.name}-{number:03d}", row.text, seed_of(settings.seed, row.name, row.seed, number))
        for row in prompts.rows
        for number in range(settings.images_per_prompt)
    ]


def seed_of(seed: int, name: str, own: int | None, number: int) -> int:
    """The seed of a prompt's picture: counted up from the row's own, else of 63 bits, from the job's and the name."""
    if own is not None:
        return own + number
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{number}".encode()).digest()[:8], "big") >> 1


def model_fingerprint(model: str | Path, stage: str = "") -> str:
    """Digest of the weights of codec and prior. CheckpointError: there is no model, or no prior in it."""
    parts = find_parts(model, stage)
    if parts.prior is None:
        raise CheckpointError(
            f"{model} has no prior yet", "only the codec is trained", "let the training reach a prior stage's end", DOCS
        )
    return weights_digest([*parts.codec.glob("*.safetensors"), *parts.prior.glob("*.safetensors")])[:32]


def _check_identity(ledger: Ledger, identity: dict[str, Any], out: Path) -> None:
    entry = ledger.done.get(IDENTITY)
    if entry is None:
        ledger.add(IDENTITY, "done", identity=identity)
        return
    other = entry["identity"]
    names = [name for name in {**identity, **other} if other.get(name) != identity.get(name)]
    if names:
        raise DataError(
            f"{out} holds pictures of another model, other prompts or other settings",
            "; ".join(f"{name}: it was {other.get(name)!r}, now {identity.get(name)!r}" for name in names),
            "name another folder with --out, or remove this one",
            DOCS,
        )


def _remove_leftovers(out: Path) -> None:
    for stale in out.glob("*.tmp"):
        stale.unlink(missing_ok=True)


def _file_tasks(out: Path, left: Sequence[Wanted], workers: int) -> list[Task]:
    share = resources(workers, len(left))
    size = max(min(AT_ONCE, -(-len(left) // share.workers)), 1)
    cut = [tuple(left[start : start + size]) for start in range(0, len(left), size)]
    return [Task(f"{some[0].key} and {len(some) - 1} more", str(out), some) for some in cut]


def _tar_tasks(out: Path, pictures: Sequence[Wanted], size: int, ledger: Ledger) -> list[Task]:
    """The tars that are not there as the ledger notes them. Which pictures a tar has does not depend on the others."""
    tasks = []
    for number, start in enumerate(range(0, len(pictures), size)):
        target = out / tar_name(number)
        entry = ledger.done.get(target.name)
        if entry is None or not target.is_file() or target.stat().st_size != entry["bytes"]:
            tasks.append(Task(target.name, str(target), tuple(pictures[start : start + size])))
    return tasks


def tar_name(number: int) -> str:
    """Of the tar with this number."""
    return f"pictures-{number:06d}.tar"


def _results(
    build: Callable[[], Worker], tasks: Sequence[Task], workers: int, done: int, total: int
) -> Iterator[tuple[Task, dict[str, str]]]:
    """Each task with what was left out of it, as they finish. `done` of `total` pictures were there before."""
    if not tasks:
        return
    share = resources(workers, len(tasks))
    with ExitStack() as stack:
        progress = stack.enter_context(JobProgress("generate", total, "pictures", start=done))
        finished = done

        def show(running: int) -> None:
            progress.update(finished + running)

        if share.workers > 1:
            stack.enter_context(ray_session(share))
            results = stack.enter_context(ActorPool(build, share)).run(tasks, show)
        else:
            results = _alone(build(), tasks, show)
        for task, skipped in results:
            finished += len(task.pictures)
            progress.update(finished)
            yield task, skipped


def _alone(worker: Worker, tasks: Sequence[Task], show: Callable[[int], None]) -> Iterator[tuple[Task, dict[str, str]]]:
    for task in tasks:
        running = 0

        def count(pictures: int) -> None:
            nonlocal running
            running += pictures
            show(running)

        yield task, worker.process(task, count)


def _write_index(out: Path, made: Sequence[Wanted], form: Form, size: int, pictures: Sequence[Wanted]) -> None:
    """index.jsonl: where each picture is, its prompt and its seed."""
    place = {item.key: tar_name(number // size) for number, item in enumerate(pictures)} if form == "tars" else {}
    lines = []
    for item in made:
        file = place.get(item.key, f"{item.key}.png")
        lines.append(
            json.dumps({"key": item.key, "file": file, "prompt": item.prompt, "seed": item.seed}, ensure_ascii=False)
            + "\n"
        )
    replace_file(out / INDEX, "".join(lines).encode())
