"""`unicom data ingest --set NAME` of what is read rather than shown: texts, documents and conversations.

A source is gone through once, sample by sample, and split into NAME and NAME-heldout by the hash of the keys: it may be
larger than memory. What is no conversation or document is left out, counted and named.
"""

import glob
import itertools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from xxhash import xxh3_128

from pipelines.parts import reason_of
from pipelines.pictures import Stored, stored_picture
from pipelines.progress import JobProgress
from pipelines.shard_sets import SetSummary, check_bad, existing, fingerprint, is_held_out, write_shard
from pipelines.sources import IMAGE_SUFFIXES, PATH_COLUMNS, TABLE_SUFFIXES, Record, key_of, slug, table_rows
from unicom_dist.config.errors import ConfigError, DataError
from unicom_dist.config.schema import DataConfig, held_out_set
from unicom_dist.data.conversations import Conversation
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.tar import Shard

log = logging.getLogger(__name__)
DOCS = "docs/data.md"
FORMS = ("messages", "document", "text")  # of a sample; of several the first


class Said(NamedTuple):
    """A sample of a source: its content as read, and the picture of its own if it has one."""

    key: str
    content: dict[str, Any]
    picture: Record | None = None


def write_text_sets(data: DataConfig, name: str) -> list[SetSummary]:
    """Make the set `name` of `data.source`, and its held-out one; what is there is not made again.

    ConfigError: no such source. DataError: nothing usable, too many bad samples, sets of another source are there.
    """
    files = _files(data.source)
    digest = xxh3_128()
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    producer = {
        "source": slug(Path(data.source).stem),
        "content": digest.hexdigest(),
        "set": name,
        "kind": data.sets[name],
        "held_out": data.held_out,
        "shard_samples": data.shard_samples,
        "image_px": data.image_px,
    }
    folders = [Path(data.path) / name, Path(data.path) / held_out_set(name)]
    found = [existing(folder, producer) for folder in folders]
    reused = None not in found
    if not reused:
        _write(data, name, files, folders, producer)
    summaries = [SetSummary.of(folder, reused) for folder in folders]
    for summary in summaries:
        log.info("%s", summary.line())
    return summaries


def _write(data: DataConfig, name: str, files: list[Path], folders: list[Path], producer: dict[str, Any]) -> None:
    """Both sets in one pass; their manifests come last."""
    manifests = [Manifest(fingerprint=fingerprint(producer), producer=producer) for _ in folders]
    for folder in folders:
        Manifest.file(folder).unlink(missing_ok=True)
        for stale in itertools.chain(folder.glob(f"{name}-[0-9]*.tar"), folder.glob("*.tmp")):
            stale.unlink()
    waiting: list[list[Stored]] = [[] for _ in folders]
    skipped, seen = manifests[0].skipped, set[str]()

    def write(which: int) -> None:
        shard = f"{name}-{len(manifests[which].shards):06d}.tar"
        manifests[which].shards.append(write_shard(folders[which], shard, waiting[which]))
        waiting[which].clear()

    root = Path(os.path.commonpath([file.parent for file in files]))
    with JobProgress(f"ingest {name}", len(files), start=0) as progress:
        for number, file in enumerate(files, 1):
            for said in _samples(file, key_of(file.relative_to(root).with_suffix("").as_posix())):
                try:
                    if said.key in seen:
                        raise DataError("the key occurs twice; the first was kept")
                    stored = _stored(said, data, name)
                except DataError as error:
                    skipped[said.key] = reason_of(error, said.key)
                    continue
                seen.add(said.key)
                which = int(is_held_out(said.key, data.held_out))
                waiting[which].append(stored)
                if len(waiting[which]) == data.shard_samples:
                    write(which)
            progress.update(number)
    check_bad(skipped, len(seen) + len(skipped), data, f"of {data.source}")
    for which, left in enumerate(waiting):
        if left:
            write(which)
    if not manifests[0].shards:
        what = f"data.source = {data.source!r} holds no sample to train on"
        raise DataError(what, f"{len(seen)} are held out", "add samples, or lower data.held_out", DOCS)
    for manifest, folder in zip(manifests, folders, strict=True):
        manifest.write(folder)


def _files(source: str) -> list[Path]:
    where = Path(source)
    if where.is_dir():
        found = sorted(path for path in where.rglob("*.txt") if path.is_file())
    elif where.suffix in TABLE_SUFFIXES or source.endswith(".tar"):
        found = sorted(path for path in map(Path, glob.glob(source, recursive=True)) if path.is_file())
    else:
        found = []
    if not found:
        raise ConfigError(
            f"data.source = {source!r} {'is no source of texts' if where.exists() else 'is not there'}",
            f"one is a folder of .txt files, tables ({', '.join(TABLE_SUFFIXES)}) or .tar files, also by a glob",
            "check the path",
            DOCS,
        )
    return found


def _samples(path: Path, key: str) -> Iterator[Said]:
    """Of a file; `key` is of the file, and so of what has no key of its own."""
    if path.suffix == ".txt":
        yield Said(key, {"text": path.read_text("utf-8", errors="replace")})
    elif path.suffix == ".tar":
        yield from _of_tar(path)
    else:
        yield from _of_table(path, key)


def _of_table(path: Path, name: str) -> Iterator[Said]:
    """Rows with `messages`, `document` or `text`; optional `key` and, relative to the table, a picture's file."""
    for number, row in enumerate(table_rows(path)):
        columns = {str(name).strip().lower(): value for name, value in row.items() if name is not None}
        key = key_of(str(columns["key"])) if columns.get("key") else f"{name}-{number:09d}"
        file = next((str(columns[name]) for name in PATH_COLUMNS if columns.get(name)), "")
        yield Said(key, columns, Record(key, (), "", str(path.parent / file)) if file else None)


def _of_tar(path: Path) -> Iterator[Said]:
    shard = Shard(path)
    for number, name in enumerate(shard.keys):
        members, key = shard[number], key_of(name)
        image = next((ext for ext in members if f".{ext.lower()}" in IMAGE_SUFFIXES), None)
        picture = Record(key, (), "", content=bytes(members[image])) if image else None
        if "txt" in members:
            yield Said(key, {"text": bytes(members["txt"]).decode("utf-8", "replace")}, picture)
            continue
        try:
            content = json.loads(bytes(members.get("json", b"{}")))
        except ValueError:
            content = {}
        yield Said(key, content if isinstance(content, dict) else {}, picture)


def _stored(said: Said, data: DataConfig, name: str) -> Stored:
    """As the loader reads it. DataError, in a few words, if that will not do."""
    form = next((form for form in FORMS if said.content.get(form)), None)
    if form is None:
        raise DataError(f"it has none of {', '.join(FORMS)}")
    content = said.content[form]
    if isinstance(content, str) and form == "messages":  # a column of text: CSV has no lists
        try:
            content = json.loads(content)
        except ValueError:
            raise DataError("`messages` is not JSON") from None
    stored = {"document" if form == "text" else form: content}
    if Conversation.parse(stored, said.key).shown() and data.sets[name] == "text":
        raise DataError(f"it shows images, and data.sets.{name} is text")
    members = {"json": json.dumps(stored, ensure_ascii=False).encode()}
    if said.picture:
        members = {"webp": stored_picture(said.picture, data.image_px), **members}
    return Stored(said.key, members)
