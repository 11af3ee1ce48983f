"""`unicom data ingest`: a source into the shard sets train/, augmented/ and heldout/ in `data.path`, and their edits.

Or into one of `data.sets` and its held-out one. What is not pairs is made by `text_sets`.

Pictures are prepared by a process per core, in key order, and written by this process alone. Which keys are held out
follows from a hash of the key. A set is finished when its manifest is there: an interrupted one is started again, a
finished set is not made again, and a set that was made with other settings is refused.
"""

import itertools
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from pipelines.edit_sets import write_edit_sets
from pipelines.parts import reason_of
from pipelines.pictures import Stored, make_views
from pipelines.progress import JobProgress
from pipelines.shard_sets import SetSummary, check_bad, existing, fingerprint, is_held_out
from pipelines.sources import Record, Source, open_source
from pipelines.text_sets import write_text_sets
from unicom_dist.config.errors import ConfigError, DataError, PreflightError
from unicom_dist.config.schema import TRAIN, Config, held_out_set
from unicom_dist.config.storage import make_folder
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.sizes import shard_sizes
from unicom_dist.data.tar import ShardEntry, ShardWriter

log = logging.getLogger(__name__)
DOCS = "docs/data.md"
CHUNK = 16  # pictures a worker process prepares at a time
BYTES_PER_PIXEL = 1.2  # lossless WebP of photographs; an upper estimate for drawings


def run(config: Config, assets: str | Path = "assets", workers: int = 0, name: str = TRAIN) -> list[SetSummary]:
    """Write the shard sets of `config.data` and return what each holds. `workers`: processes, 0 = one per core.

    `name`: of the set to make of `data.source`. ConfigError: no such source or set. DataError: nothing usable, too many
    bad samples, sets of another source or other settings are there. PreflightError: the folder cannot be written or is
    too small.
    """
    data = config.data
    if name not in data.kinds:
        raise ConfigError(
            f"--set {name}",
            f"the recipe has the sets {', '.join(data.kinds)}",
            f"name it with what it holds, such as data.sets.{name}=pairs, in the recipe or after this command",
            DOCS,
        )
    if data.kinds[name] != "pairs":
        return write_text_sets(data, name)
    source = open_source(data, assets)
    target = Path(data.path)
    held = [record for record in source.records if is_held_out(record.key, data.held_out)]
    train = [record for record in source.records if not is_held_out(record.key, data.held_out)]
    plan: list[tuple[str, list[Record], range]] = [(name, train, range(1))]
    if data.augmented_views and name == TRAIN:
        plan.append(("augmented", train, range(1, data.augmented_views + 1)))
    plan.append((held_out_set(name), held, range(1)))
    check_bad(source.skipped, len(source.records) + len(source.skipped), data, "in the source")
    views_each = f", {data.augmented_views} augmented views each" if data.augmented_views else ""
    log.info(
        "%s: %d captioned pictures, %d to train%s, %d held out",
        source.name,
        len(source.records),
        len(train),
        views_each,
        len(held),
    )
    todo = []
    for each, records, views in plan:
        manifest = existing(target / each, _producer(source, each, views, config))
        if manifest is None:
            todo.append((each, records, views))
    pictures = sum(len(records) * len(views) for _, records, views in todo)
    if pictures:
        _check_room(target, pictures * data.image_px**2 * BYTES_PER_PIXEL)
    if todo:
        with _Pool(workers) as pool:
            for each, records, views in todo:
                _write_set(pool, source, each, records, views, config)
    summaries = []
    for each, _, _ in plan:
        summaries.append(SetSummary.of(target / each, each not in {done for done, _, _ in todo}))
        log.info("%s", summaries[-1].line())
    if data.edits and name == TRAIN:
        summaries += write_edit_sets(config)
    return summaries


def _producer(source: Source, name: str, views: range, config: Config) -> dict[str, Any]:
    data = config.data
    producer: dict[str, Any] = {
        "source": source.name,
        "listing": source.fingerprint,
        "set": name,
        "image_px": data.image_px,
        "held_out": data.held_out,
        "shard_samples": data.shard_samples,
    }
    if len(views) and views[0]:
        producer |= {"views": len(views), "seed": config.seed}
    return producer


def _check_room(target: Path, needed: float) -> None:
    make_folder(target)
    free = shutil.disk_usage(target).free
    if free < needed:
        raise PreflightError(
            f"data.path = {str(target)!r}: {free / 1e9:.1f} GB free",
            f"the shards may need {needed / 1e9:.1f} GB",
            "free space, lower data.image_px or data.augmented_views, or choose another folder",
            DOCS,
        )


def _write_set(
    pool: "_Pool", source: Source, name: str, records: Sequence[Record], views: range, config: Config
) -> None:
    """Write one set and its manifest."""
    data = config.data
    folder = Path(data.path) / name
    Manifest.file(folder).unlink(missing_ok=True)
    for stale in itertools.chain(folder.glob(f"{source.name}-[0-9]*.tar"), folder.glob("*.tmp")):
        stale.unlink()
    skipped = dict(source.skipped) if name in data.pairs else {}
    bad: dict[str, str] = {}
    entries: list[ShardEntry] = []
    samples = 0

    def prepared() -> Iterator[Stored]:
        with JobProgress(f"ingest {name}", len(records) * len(views), start=0) as progress:
            for number, (record, result) in enumerate(zip(records, pool.map(records, views, config), strict=True), 1):
                if isinstance(result, str):
                    bad[record.key] = result
                    check_bad(bad, len(records), data, f"of {name}")
                else:
                    yield from result
                progress.update(number * len(views))

    stored = prepared()
    for number in itertools.count():
        batch = itertools.islice(stored, data.shard_samples)
        first = next(batch, None)
        if first is None:
            break
        with ShardWriter(folder / f"{source.name}-{number:06d}.tar") as writer:
            for sample in itertools.chain([first], batch):
                writer.write(sample.key, sample.members)
        entries.append(writer.entry)
        shard_sizes(folder, writer.entry)
        samples += writer.entry.samples
    if not samples and name in data.pairs:
        raise DataError(f"{folder}: no sample is left", f"{len(bad)} were skipped", "check the source", DOCS)
    producer = _producer(source, name, views, config)
    manifest = Manifest(fingerprint=fingerprint(producer), producer=producer, shards=entries, skipped=skipped | bad)
    manifest.write(folder)


def _prepare(records: Sequence[Record], views: range, image_px: int, seed: int) -> list[list[Stored] | str]:
    """The samples of each record, or why there are none. Runs in a worker process."""
    results: list[list[Stored] | str] = []
    for record in records:
        try:
            results.append(make_views(record, views, image_px, seed))
        except DataError as error:
            results.append(reason_of(error, record.key))
    return results


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent answers it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed says nothing: its workers would wait for the next chunk for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


class _Pool:
    """Worker processes that prepare pictures; results come in order, a few chunks ahead of the writer."""

    def __init__(self, workers: int) -> None:
        self._workers = workers or len(os.sched_getaffinity(0))
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> "_Pool":
        # Spawned, not forked: the parent may hold threads and locks.
        self._executor = ProcessPoolExecutor(self._workers, multiprocessing.get_context("spawn"), _begin_worker)
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def map(self, records: Sequence[Record], views: range, config: Config) -> Iterator[list[Stored] | str]:
        """One result per record, in order. PreflightError if a worker process dies."""
        assert self._executor is not None
        size = max(CHUNK // len(views), 1)
        chunks = iter([records[start : start + size] for start in range(0, len(records), size)])
        pending: list[Future[list[list[Stored] | str]]] = []
        try:
            while True:
                for chunk in itertools.islice(chunks, 3 * self._workers - len(pending)):
                    pending.append(self._executor.submit(_prepare, chunk, views, config.data.image_px, config.seed))
                if not pending:
                    return
                yield from pending.pop(0).result()
        except BrokenProcessPool as error:
            raise PreflightError(
                "a worker process of the ingest was killed",
                "often the machine ran out of memory",
                "run the command again; finished sets are kept",
                DOCS,
            ) from error
