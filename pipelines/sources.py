"""Where image-text pairs come from: the built-in emoji, a folder, a table, or tars that exist already.

A source lists records (key, captions, where the picture is) without reading pictures; what cannot become a record is
listed as skipped with the reason. Keys have no dots and no slashes, so that every WebDataset tool reads the shards.
"""

import csv
import glob
import hashlib
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from unicom_dist.config.errors import ConfigError, DataError
from unicom_dist.config.schema import DataConfig
from unicom_dist.data.tar import Shard

DOCS = "docs/data.md"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
PATH_COLUMNS = ("path", "image", "file", "file_name", "filename")
_CAPTION_COLUMNS = ("caption", "text", "captions")
# A mirrored picture contradicts these captions, or shows mirrored writing.
_SIDED = re.compile(
    r"\b(left|right|west|east|clockwise|counterclockwise|o.clock|thirty|button|keycap|flag|letters?|latin|input|"
    r"japanese|calendar|abacus|100|input|symbols?|numbers?|heavy dollar sign|question|percent)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Record:
    """One image with its captions. The picture is a file, a (sample number, extension) of a tar, or bytes."""

    key: str
    captions: tuple[str, ...]
    source: str
    path: str = ""
    member: tuple[int, str] | None = None
    size: int = -1
    content: bytes = b""

    def read(self) -> bytes:
        """The encoded picture. OSError or DataError if the file cannot be read."""
        if self.content:
            return self.content
        if self.member:
            return bytes(_open_shard(self.path).member(*self.member))
        return Path(self.path).read_bytes()

    @property
    def may_mirror(self) -> bool:
        """Whether the captions stay true when the picture is mirrored."""
        return not any(_SIDED.search(caption) for caption in self.captions)


@lru_cache(maxsize=8)
def _open_shard(path: str) -> Shard:
    return Shard(path)


@dataclass
class Source:
    """Records in key order, what was left out ({key: reason}), and the identity of the listing."""

    name: str
    records: list[Record] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""


def open_source(config: DataConfig, assets: str | Path = "assets") -> Source:
    """List `data.source`. ConfigError: no such source; DataError: nothing in it, or it cannot be read."""
    where = config.source
    if where == "fluent-emoji":
        source = Source("fluent-emoji")
        pairs = _fluent_emoji(Path(assets) / "fluent-emoji", config.languages)
    elif Path(where).is_dir():
        source = Source(slug(Path(where).resolve().name))
        pairs = _folder(Path(where))
    elif Path(where).suffix in TABLE_SUFFIXES and Path(where).is_file():
        source = Source(slug(Path(where).stem))
        pairs = _table(Path(where))
    elif where.endswith(".tar") and glob.glob(where, recursive=True):
        source = Source(slug(Path(where).resolve().parent.name or "tars"))
        pairs = _tars(sorted(glob.glob(where, recursive=True)))
    else:
        raise ConfigError(
            f"data.source = {where!r} {'is no source' if Path(where).exists() else 'is not there'}",
            f"a source is `fluent-emoji`, a folder, a table ({', '.join(TABLE_SUFFIXES)}) or a glob of .tar files",
            "check the path",
            DOCS,
        )
    _collect(source, pairs)
    if not source.records:
        reasons = ", ".join(f"{key}: {reason}" for key, reason in list(source.skipped.items())[:3])
        raise DataError(
            f"data.source = {where!r} holds no usable image-text pair",
            reasons or f"no file ends in {', '.join(IMAGE_SUFFIXES)}",
            "a picture needs a caption: NAME.txt beside NAME.png, or a row of a table",
            DOCS,
        )
    if config.limit:
        # By hash, not by key: neighbouring keys are alike (the first emoji are all flags).
        chosen = sorted(source.records, key=lambda record: _rank(record.key))[: config.limit]
        source.records = sorted(chosen, key=lambda record: record.key)
    digest = hashlib.sha256()
    for record in source.records:
        digest.update(repr((record.key, record.captions, record.path, record.size)).encode())
        digest.update(hashlib.sha256(record.content).digest())
    source.fingerprint = digest.hexdigest()[:32]
    return source


def _collect(source: Source, pairs: Iterable[Record]) -> None:
    """Drop empty captions and repeated keys; order by key."""
    kept: dict[str, Record] = {}
    for record in pairs:
        captions = tuple(dict.fromkeys(" ".join(caption.split()) for caption in record.captions if caption.strip()))
        if record.key in kept:
            _skip(source, record.key, "the key occurs twice; the first was kept")
        elif not captions:
            _skip(source, record.key, "no caption")
        else:
            kept[record.key] = Record(**{**vars(record), "captions": captions, "source": source.name})
    source.records = [kept[key] for key in sorted(kept)]


def _skip(source: Source, key: str, reason: str) -> None:
    name, number = key, 2
    while name in source.skipped:
        name, number = f"{key} ({number})", number + 1
    source.skipped[name] = reason


def slug(name: str) -> str:
    """A name for files and keys: ASCII letters, digits, - and _; anything else becomes _."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_-") or "source"


def key_of(stem: str) -> str:
    """Key of a picture from its path without extension. Long or non-ASCII ones end in a digest: tar names are short."""
    key = slug(stem)
    if len(key) > 72 or key.startswith("__") or not stem.isascii():
        key = f"{key[:56]}-{hashlib.sha256(stem.encode()).hexdigest()[:12]}"
    return key


def _fluent_emoji(folder: Path, languages: list[str]) -> Iterator[Record]:
    """Renders without skin tones. Caption: the CLDR name in the first language; then names and keywords of all."""
    archives = [folder / name for name in ("emoji.tgz", "annotations.tgz", "annotations-derived.tgz")]
    missing = [str(path) for path in archives if not path.is_file()]
    if missing:
        remedy = "run `unicom data fetch` with the same recipe first"
        raise DataError(f"{missing[0]} is not there", "the emoji are fetched", remedy, DOCS)
    names: list[dict[str, Any]] = [{} for _ in languages]
    for path, kind in ((archives[1], "annotations"), (archives[2], "annotationsDerived")):
        with tarfile.open(path) as tar:
            for annotations, language in zip(names, languages, strict=True):
                try:
                    content = tar.extractfile(f"package/{kind}/{language}/annotations.json")
                except KeyError as error:
                    raise ConfigError(
                        f"data.languages: no captions in {language!r}",
                        "CLDR has none under this name",
                        "a language such as en, de, fr, zh, ja",
                        DOCS,
                    ) from error
                annotations |= json.load(content)[kind]["annotations"]  # type: ignore[arg-type]
    with tarfile.open(archives[0]) as tar:
        for member in tar:
            if not member.name.endswith(".webp"):
                continue
            stem = PurePosixPath(member.name).stem
            points = [int(point, 16) for point in stem.replace("_", "-").split("-")]
            if any(0x1F3FB <= point <= 0x1F3FF for point in points):
                continue
            emoji = "".join(map(chr, points))
            found = [a.get(emoji) or a.get(emoji.replace("\ufe0f", "")) for a in names]
            if found[0] is None:
                continue  # a flag or symbol that CLDR does not name
            captions = [name for entry in found if entry for name in entry["tts"]]
            captions += [keyword for entry in found if entry for keyword in entry.get("default", ())]
            content = tar.extractfile(member)
            yield Record(stem.replace("_", "-"), tuple(captions), "", content=content.read() if content else b"")


def _folder(folder: Path) -> Iterator[Record]:
    """Pictures below `folder` with NAME.txt beside them (one caption a line)."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
            continue
        text = path.with_suffix(".txt")
        captions = _lines(text) if text.is_file() else ()
        stem = path.relative_to(folder).with_suffix("").as_posix()
        yield Record(key_of(stem), captions, "", str(path), size=path.stat().st_size)


def _lines(path: Path) -> tuple[str, ...]:
    return tuple(path.read_text(encoding="utf-8", errors="replace").splitlines())


def _table(path: Path) -> Iterator[Record]:
    """Rows of path and caption (columns `path|image|file`, `caption|text`, optional `key`); paths are relative to it.

    Several rows of one picture are further captions of it.
    """
    rows: dict[str, tuple[str, list[str]]] = {}
    for number, row in enumerate(table_rows(path), 1):
        columns = {str(name).strip().lower(): value for name, value in row.items() if name is not None}
        image = next((columns[name] for name in PATH_COLUMNS if columns.get(name)), None)
        if not any(name in columns for name in PATH_COLUMNS) or not any(name in columns for name in _CAPTION_COLUMNS):
            raise DataError(
                f"{path}: columns {', '.join(columns) or 'none'}",
                f"needed: the picture's file ({', '.join(PATH_COLUMNS)}), its caption ({', '.join(_CAPTION_COLUMNS)})",
                "rename the columns",
                DOCS,
            )
        value = next((columns[name] for name in _CAPTION_COLUMNS if columns.get(name)), "")
        captions = [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]
        name = str(image or f"row-{number}")
        key = str(columns["key"]) if columns.get("key") else key_of(PurePosixPath(name).with_suffix("").as_posix())
        rows.setdefault(name, (slug(key), []))[1].extend(captions)
    for name, (key, captions) in rows.items():
        file = path.parent / name
        yield Record(key, tuple(captions), "", str(file), size=file.stat().st_size if file.is_file() else -1)


def table_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a table, one at a time. DataError: it cannot be read."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as parquet

            for batch in parquet.ParquetFile(path).iter_batches(4096):
                yield from batch.to_pylist()
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                for line in file:
                    if line.strip():
                        row = json.loads(line)
                        yield row if isinstance(row, dict) else {}
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield from csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's and json's errors are ValueErrors
        raise DataError(f"{path} cannot be read", str(error).splitlines()[0], "check the file", DOCS) from error


def _tars(paths: list[str]) -> Iterator[Record]:
    """Samples of WebDataset tars: a picture, and its caption in .txt or in .json under `caption` or `text`."""
    for path in paths:
        shard = Shard(path)
        for number, key in enumerate(shard.keys):
            members = shard[number]
            image = next((ext for ext in members if f".{ext.lower()}" in IMAGE_SUFFIXES), None)
            if image is None:
                yield Record(key_of(key), (), "")  # no picture: counted as skipped, as without a caption
                continue
            captions, size = _tar_captions(members), len(members[image])
            yield Record(key_of(key), captions, "", path, (number, image), size)


def _tar_captions(members: dict[str, memoryview]) -> tuple[str, ...]:
    if "txt" in members:
        return tuple(bytes(members["txt"]).decode("utf-8", "replace").splitlines())
    try:
        content = json.loads(bytes(members.get("json", b"")) or b"{}")
        further = content.get("captions") or []
        return (str(content.get("caption") or content.get("text") or ""), *map(str, further))
    except (ValueError, AttributeError):
        return ()


def _rank(key: str) -> bytes:
    return hashlib.sha256(f"limit/{key}".encode()).digest()
