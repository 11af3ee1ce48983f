"""Published Qwen2.5 folders into the backbone: `config.json` and one or several safetensors files.

Only safetensors are read, tensor by tensor, of a cut matrix the cut. With a trimmed vocabulary the rows of the tables
are picked by source id.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unicom_dist.config.errors import CheckpointError, ConfigError
from unicom_dist.config.schema import PriorConfig
from unicom_dist.models.backbone import Qwen2
from unicom_dist.models.init import Source
from unicom_dist.parallel.engine import Piece

# Our field, the published key, and what the architecture says where the key is missing.
FIELDS = (
    ("hidden", "hidden_size", None),
    ("layers", "num_hidden_layers", None),
    ("heads", "num_attention_heads", None),
    ("kv_heads", "num_key_value_heads", None),
    ("ffn", "intermediate_size", None),
    ("norm_eps", "rms_norm_eps", 1e-6),
    ("tie_embeddings", "tie_word_embeddings", False),
)
DOCS = "docs/checkpoints.md"
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
QK_NORMS = ("q_norm.weight", "k_norm.weight")  # Qwen2.5 has none


def published_source(config: PriorConfig, source_ids: Sequence[int]) -> Source:
    """The backbone's weights in `config.init_from`; `source_ids[row]` is the published id of each vocabulary row.

    Norms of queries and keys, which the published architecture lacks, start at ones.
    Of a cut matrix only the cut is read. ConfigError: the recipe describes another model. CheckpointError: files
    damaged, or, when it is asked for, without a tensor.
    """
    folder = Path(config.init_from)
    check_architecture(config, folder)
    files: dict[str, tuple[Path, Any]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with readable(path):
            file: Any = safe_open(path, framework="pt")
            files |= dict.fromkeys(file.keys(), (path, file))

    def read(piece: Piece) -> Tensor:
        name = piece.name.removeprefix("backbone.")
        if name not in files and name.endswith(QK_NORMS):
            return torch.ones(piece.cut)
        if name not in files:
            raise CheckpointError(
                f"{folder} lacks {name}",
                "the model would start from a mixture of published and random weights",
                "a folder with all *.safetensors of the model",
            )
        path, file = files[name]
        with readable(path):
            stored = file.get_slice(name)
            check_shape(piece, tuple(stored.get_shape()), name in TABLES, folder)
            mine = slice(piece.begin, piece.begin + piece.cut[piece.dim])
            if name in TABLES:
                rows = list(source_ids[mine])
                check_rows(rows, stored.get_shape()[0], folder)
                values: Tensor = stored[_as_slice(rows)]
            else:
                values = stored[:, mine] if piece.dim == 1 else stored[mine]
            return values

    return read


def _as_slice(rows: list[int]) -> slice | list[int]:
    """Consecutive rows as a slice, which is read straight from the file."""
    first = rows[0] if rows else 0
    return slice(first, first + len(rows)) if rows == list(range(first, first + len(rows))) else rows


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """CheckpointError, naming `path`, when what is done to that file fails."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}", str(error).splitlines()[0], "fetch the file again") from error


@contextmanager
def quietly(library: str) -> Iterator[None]:
    """Without `library`'s warnings about the folder it reads: whoever calls says what does not fit, and refuses it."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def table_rows(folder: Path) -> int:
    """Rows of the published embedding, spare ones beyond the tokenizer's ids included. CheckpointError: not said."""
    rows = _published_config(folder).get("vocab_size")
    if not isinstance(rows, int):
        raise CheckpointError(
            f"prior.init_from = {folder}", "its config.json names no vocab_size", "a folder of published weights"
        )
    return rows


def _published_config(folder: Path) -> dict[str, Any]:
    try:
        published: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"prior.init_from = {folder}", f"no readable config.json there: {error}", "a folder of published weights"
        ) from error
    return published


def check_architecture(config: PriorConfig, folder: Path) -> None:
    """ConfigError naming every field in which the recipe and `folder/config.json` differ."""
    published = _published_config(folder)
    theta = published.get("rope_theta") or (published.get("rope_parameters") or {}).get("rope_theta", 10_000.0)
    expected = {field: published.get(key, default) for field, key, default in FIELDS} | {"rope_theta": theta}
    different = {field: value for field, value in expected.items() if getattr(config, field) != value}
    if published.get("model_type", "qwen2") != "qwen2":
        raise ConfigError(
            f"prior.init_from = {folder}",
            f"a {published['model_type']} model, the backbone is qwen2",
            "Qwen2.5 weights",
        )
    if different:
        raise ConfigError(
            "prior: " + ", ".join(f"{field} = {getattr(config, field)}" for field in different),
            f"the weights in {folder} belong to another architecture",
            " ".join(f"prior.{field}={json.dumps(value)}" for field, value in different.items()),
        )


def check_shape(piece: Piece, stored: tuple[int, ...], is_table: bool, folder: Path) -> None:
    """CheckpointError if a tensor has not the shape that config.json says; a table may have any number of rows."""
    if stored[is_table:] != piece.shape[is_table:]:
        raise CheckpointError(
            f"{piece.name} is {list(stored)} in {folder}",
            f"its config.json says {list(piece.shape)}",
            "a folder with all *.safetensors of one model",
        )


def check_rows(rows: Sequence[int], stored: int, folder: Path) -> None:
    """CheckpointError if the vocabulary needs rows the published table lacks."""
    if max(rows, default=0) >= stored:
        raise CheckpointError(
            f"the vocabulary needs row {max(rows)} of the embedding",
            f"{folder} has {stored} rows: its tokenizer is another one",
            "prior.tokenizer of the same model as prior.init_from",
        )


def prior_section(folder: Path) -> dict[str, Any]:
    """What a recipe says under `prior` to start from `folder`, once all its tensors are there in the right shapes.

    Reads the headers of the files alone. CheckpointError: not Qwen2, incomplete or damaged.
    """
    published = _published_config(folder)
    theta = published.get("rope_theta") or (published.get("rope_parameters") or {}).get("rope_theta", 10_000.0)
    section = {field: published.get(key, default) for field, key, default in FIELDS} | {"rope_theta": float(theta)}
    try:
        if published.get("model_type", "qwen2") != "qwen2":
            raise ValueError(f"a {published['model_type']} model, the backbone is qwen2")
        with torch.device("meta"):
            model = Qwen2(PriorConfig.model_validate(section), table_rows(folder))
    except ValueError as error:
        raise CheckpointError(
            f"{folder} cannot be imported", " ".join(str(error).splitlines()[:3]), "a folder of Qwen2.5 weights", DOCS
        ) from None
    stored: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with readable(path), safe_open(path, framework="pt") as file:
            stored |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    wrong = sorted(name for name, shape in wanted.items() if stored.get(name) != shape)
    if wrong:
        has = list(stored[wrong[0]]) if wrong[0] in stored else "absent"
        raise CheckpointError(
            f"{folder}: {wrong[0]} is {has}, its config.json says {list(wanted[wrong[0]])}",
            f"{len(wrong)} of {len(wanted)} tensors are missing or of another shape",
            "a folder with all *.safetensors of one model",
            DOCS,
        )
    place = str(folder.resolve())
    return {"init_from": place, **({"tokenizer": place} if (folder / "tokenizer.json").is_file() else {}), **section}
