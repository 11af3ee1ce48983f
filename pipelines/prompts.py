"""A file of prompts: one a line, or rows of a table. A row that cannot be drawn is named, and the others are kept.

    .txt                      one prompt a line, empty lines do not count
    .jsonl                    {"prompt": …, "id"?: …, "seed"?: …}
    .csv, .tsv, .parquet      the same as columns
Without an id, a prompt is called by the number of its line or row, counted from 1.
"""

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unicom_dist.config.errors import ConfigError, DataError

DOCS = "docs/sampling.md"
SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")
_PLAIN = re.compile(r"(?!__)[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Prompt:
    """What to draw, under which name, and the seed of its first picture if the row names one."""

    name: str
    text: str
    seed: int | None = None


@dataclass
class Prompts:
    """The rows that can be drawn, in the order of the file, and {row: reason} of the others."""

    rows: list[Prompt] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Identity of what is drawn, whatever form the file has."""
        content = json.dumps([(row.name, row.text, row.seed) for row in self.rows])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_prompts(path: Path, column: str = "prompt") -> Prompts:
    """The prompts of a file. `column`: where a table has them.

    ConfigError: a kind of file that is not read. DataError: it cannot be read, has no such column, holds no prompt.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"{path} is no file of prompts", f"known are {' '.join(SUFFIXES)}", "one prompt a line in a .txt does", DOCS
        )
    found, names = Prompts(), set[str]()
    for number, row in _rows(path, column):
        try:
            prompt = _prompt(row, number, column)
            if prompt.name in names:
                raise ValueError("its id occurs twice; the first was kept")
        except ValueError as error:
            found.bad[f"row {number}"] = str(error)
            continue
        names.add(prompt.name)
        found.rows.append(prompt)
    if not found.rows:
        reason = "; ".join(f"{name}: {why}" for name, why in list(found.bad.items())[:3])
        raise DataError(f"{path} holds no prompt", reason or "it is empty", "write one prompt a line", DOCS)
    return found


def _prompt(row: Any, number: int, column: str) -> Prompt:
    """ValueError: why the row cannot be drawn."""
    if not isinstance(row, dict):
        raise ValueError(row if isinstance(row, str) else "it is not a JSON object")
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"it has no {column!r}")
    if row.get("negative"):
        raise ValueError(
            "it has a negative prompt, which the model cannot follow: it was trained with empty ones alone"
        )
    seed, name = row.get("seed"), row.get("id")
    if seed in (None, ""):
        seed = None
    else:
        try:
            if isinstance(seed, bool) or float(seed) != int(seed) or not 0 <= int(seed) < 1 << 62:
                raise ValueError
            seed = int(seed)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"its seed {seed!r} is not a whole number from 0 to 2^62") from None
    return Prompt(name_of(f"{number:06d}" if name in (None, "") else str(name)), text.strip(), seed)


def name_of(identifier: str) -> str:
    """The name of a prompt's files: its id, or, where that is not plain ASCII, what is left of it and a digest."""
    if _PLAIN.fullmatch(identifier):
        return identifier
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", identifier).strip("_-")[:48]
    return f"{plain or 'prompt'}-{hashlib.sha256(identifier.encode()).hexdigest()[:12]}"


def _rows(path: Path, column: str) -> Iterator[tuple[int, Any]]:
    """(number, row); a row that cannot be parsed is the reason why, a text."""
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet as parquet

            table = parquet.ParquetFile(path)
            _check_column(path, column, table.schema_arrow.names)
            rows = (row for batch in table.iter_batches(4096) for row in batch.to_pylist())
            yield from enumerate(rows, 1)
            return
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            if path.suffix.lower() in (".csv", ".tsv"):
                reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
                _check_column(path, column, list(reader.fieldnames or ()))
                yield from enumerate(reader, 1)
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, {column: line} if path.suffix.lower() == ".txt" else _parsed(line)
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's errors are ValueErrors
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
        raise DataError(f"{path} cannot be read", reason, "check the file", DOCS) from error


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        return f"it is not JSON: {error}"


def _check_column(path: Path, column: str, names: list[str]) -> None:
    if column not in names:
        raise DataError(
            f"{path} has no column {column!r}", f"it has {', '.join(names) or 'none'}", "name one with --column", DOCS
        )
