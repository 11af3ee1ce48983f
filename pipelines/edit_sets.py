"""The sets of edits that `unicom data ingest` makes: `edits` of training pictures, `edits-heldout` of held-out ones.

A sample is a conversation (`unicom_dist/data/conversations.py`): the user shows pictures by their keys and says what to
do, the assistant shows the sample's own image. Every kind has the same share; of a kind a picture is used once, in the
order of a hash. Neither set refers to pictures of the other's.
"""

import hashlib
import io
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.edits import KINDS, Edit, Kind, Subject, make_edit
from pipelines.pictures import Stored
from pipelines.progress import JobProgress
from pipelines.shard_sets import SetSummary, existing, fingerprint, write_shard
from unicom_dist.config.errors import DataError
from unicom_dist.config.schema import EDITS, Config, held_out_set
from unicom_dist.data.decode import decode_image
from unicom_dist.data.manifest import Manifest
from unicom_dist.data.pairs import captions_of, image_of
from unicom_dist.data.shardset import ShardSet

log = logging.getLogger(__name__)
HELD_OUT_PART = 5  # training edits for each held-out one


def write_edit_sets(config: Config) -> list[SetSummary]:
    """Make `data.edits` edits of the sets `train` and `heldout`, which are there; what is there is not made again.

    DataError: edits of other pictures or settings are there. PreflightError: the folder cannot be written.
    """
    data = config.data
    held_out = max(data.edits // HELD_OUT_PART, len(KINDS))
    summaries = []
    for name, base, count in ((EDITS, "train", data.edits), (held_out_set(EDITS), "heldout", held_out)):
        pairs, folder = ShardSet(Path(data.path) / base), Path(data.path) / name
        if not len(pairs):
            continue
        producer = {"of": pairs.manifest.fingerprint, "set": name, "edits": count, "shard_samples": data.shard_samples}
        reused = existing(folder, producer) is not None
        if not reused:
            _write(folder, pairs, count, producer)
        summaries.append(SetSummary.of(folder, reused))
        log.info("%s", summaries[-1].line())
    return summaries


def _write(folder: Path, pairs: ShardSet, count: int, producer: dict[str, Any]) -> None:
    Manifest.file(folder).unlink(missing_ok=True)
    for stale in itertools.chain(folder.glob("edits-[0-9]*.tar"), folder.glob("*.tmp")):
        stale.unlink()
    manifest = Manifest(fingerprint=fingerprint(producer), producer=producer)
    with JobProgress(f"ingest {folder.name}", count, start=0) as progress:
        stored = made(pairs, count, manifest.skipped)
        for number in itertools.count():
            batch = list(itertools.islice(stored, producer["shard_samples"]))
            if not batch:
                break
            manifest.shards.append(write_shard(folder, f"edits-{number:06d}.tar", batch))
            progress.update(manifest.samples)
    if manifest.samples < count:
        log.warning("%s: %d edits, as many as the pictures of %s give", folder, manifest.samples, pairs.folder)
    manifest.write(folder)


def made(pairs: ShardSet, count: int, skipped: dict[str, str]) -> Iterator[Stored]:
    """At most `count` edits of the pictures of a set, kind by kind. What cannot be read is noted in `skipped`."""
    for place, kind in enumerate(KINDS):
        wanted = count * (place + 1) // len(KINDS) - count * place // len(KINDS)
        yield from itertools.islice(_of_kind(pairs, kind, skipped), wanted)


def _of_kind(pairs: ShardSet, kind: Kind, skipped: dict[str, str]) -> Iterator[Stored]:
    keys = list(pairs.keys())
    order = sorted(range(len(keys)), key=lambda number: hashlib.sha256(f"{kind}/{keys[number]}".encode()).digest())
    for number, neighbour in zip(order, [*order[1:], order[0]], strict=True):
        try:
            subject = _subject(pairs, number)
            other = _subject(pairs, neighbour) if kind == "compose" else subject
        except DataError as error:
            skipped[pairs.key(number)] = error.what
            continue
        edit = make_edit(kind, subject, other)
        if edit is not None:
            yield _stored(kind, subject.key, edit)


def _subject(pairs: ShardSet, number: int) -> Subject:
    sample = pairs[number]
    return Subject(sample.key, captions_of(sample).main, decode_image(image_of(sample), sample.key))


def _stored(kind: Kind, key: str, edit: Edit) -> Stored:
    shown = [{"type": "image", "image": reference} for reference in edit.references]
    content = {
        "messages": [
            {"role": "user", "content": [*shown, {"type": "text", "text": edit.instruction}]},
            {"role": "assistant", "content": [{"type": "image", "image": ""}]},
        ],
        "caption": edit.caption,
        "edit": kind,
    }
    buffer = io.BytesIO()
    edit.target.save(buffer, "webp", lossless=True, quality=20, method=0)
    members = {"webp": buffer.getvalue(), "json": json.dumps(content, ensure_ascii=False).encode()}
    return Stored(f"edit-{kind}-{key}", members)
