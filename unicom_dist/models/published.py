"""Published Qwen2.5 folders into the backbone: `config.json` and one or several safetensors files.

Of a vision-language model around a Qwen2.5 (Qwen2.5-VL, LLaVA-OneVision and others) its language model is taken. Only
safetensors are read, tensor by tensor, of a cut matrix the cut. With a trimmed vocabulary the rows of the tables are
picked by source id.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unicom_dist.config.errors import CheckpointError, ConfigError
from unicom_dist.config.schema import PriorConfig
from unicom_dist.models.backbone import Qwen2
from unicom_dist.models.init import Source
from unicom_dist.parallel.engine import Piece

# Our field and the published key.
FIELDS = (
    ("hidden", "hidden_size"),
    ("layers", "num_hidden_layers"),
    ("heads", "num_attention_heads"),
    ("kv_heads", "num_key_value_heads"),
    ("ffn", "intermediate_size"),
    ("norm_eps", "rms_norm_eps"),
)
# The languages of Qwen2-VL and Qwen2.5-VL are qwen2 where all three rotary positions are one, as in text and as here.
QWEN2 = ("qwen2", "qwen2_vl_text", "qwen2_5_vl_text")
DOCS = "docs/checkpoints.md"
HEAD = "lm_head.weight"
TABLES = ("model.embed_tokens.weight", HEAD)
QK_NORMS = ("q_norm.weight", "k_norm.weight")  # Qwen2.5 has none


def published_source(config: PriorConfig, source_ids: Sequence[int]) -> Source:
    """The backbone's weights in `config.init_from`; `source_ids[row]` is the published id of each vocabulary row.

    Norms of queries and keys, which the published architecture lacks, start at ones.
    Of a cut matrix only the cut is read. ConfigError: the recipe describes another model. CheckpointError: files
    damaged, or, when it is asked for, without a tensor.
    """
    folder = Path(config.init_from)
    check_architecture(config, folder)
    published = _language_model(folder)

    def read(piece: Piece) -> Tensor:
        name = piece.name.removeprefix("backbone.")
        if name not in published and name.endswith(QK_NORMS):
            return torch.ones(piece.cut)
        if name not in published:
            raise CheckpointError(
                f"{folder} lacks {name}",
                "the model would start from a mixture of published and random weights",
                "a folder with all *.safetensors of the model",
            )
        path, file, stored_name = published[name]
        with readable(path):
            stored = file.get_slice(stored_name)
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


class Architecture(NamedTuple):
    """Of the language model in a published folder."""

    fields: dict[str, Any]  # by the names of `PriorConfig`
    rows: int  # of its tables, spare ones beyond the tokenizer's ids included


def architecture(folder: Path) -> Architecture:
    """What `folder/config.json` says, as transformers reads it. CheckpointError: no Qwen2.5 in it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig  # here, since only a start from published weights needs it

    try:
        if not (folder / "config.json").is_file():
            raise ValueError("there is no config.json in it")
        with quietly("transformers"):
            whole = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        language = whole.get_text_config(decoder=True)
        if language.model_type not in QWEN2:
            raise ValueError(f"its language model is {language.model_type}, the backbone is qwen2")
        rope = language.rope_parameters
        if rope["rope_type"] != "default":
            raise ValueError(f"its rotary frequencies are scaled ({rope['rope_type']}), the backbone's are not")
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(
            f"the backbone cannot start from {folder}",
            " ".join(str(error).splitlines()[:2]).strip(),
            "prior.init_from = the folder of a Qwen2.5, or of a vision-language model around one",
            DOCS,
        ) from error
    fields = {ours: getattr(language, key) for ours, key in FIELDS}
    fields |= {"rope_theta": float(rope["rope_theta"]), "tie_embeddings": bool(whole.tie_word_embeddings)}
    return Architecture(fields, language.vocab_size)


class Stored(NamedTuple):
    """A tensor in an open file."""

    path: Path
    file: Any
    name: str


def _language_model(folder: Path) -> dict[str, Stored]:
    """The language model's tensors in `folder`, by the names Qwen2.5 has for them. CheckpointError: a damaged file.

    They are where the one embedding of tokens is: LLaVA's under `language_model.model.`, others' under
    `model.language_model.`.
    """
    stored: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with readable(path):
            file: Any = safe_open(path, framework="pt")
            stored |= {name: Stored(path, file, name) for name in file.keys()}  # noqa: SIM118
    embeddings = [name for name in stored if name.endswith("embed_tokens.weight")]
    prefix = embeddings[0].removesuffix("embed_tokens.weight") if len(embeddings) == 1 else "model."
    found = {"model." + name.removeprefix(prefix): stored[name] for name in stored if name.startswith(prefix)}
    for name in stored:
        if name.endswith(HEAD):
            found[HEAD] = stored[name]
    return found


def check_architecture(config: PriorConfig, folder: Path) -> None:
    """ConfigError naming every field in which the recipe and `folder/config.json` differ; else as `architecture`."""
    expected = architecture(folder).fields
    different = {field: value for field, value in expected.items() if getattr(config, field) != value}
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
    section, rows = architecture(folder)
    try:
        with torch.device("meta"):
            model = Qwen2(PriorConfig.model_validate(section), rows)
    except ValueError as error:
        raise CheckpointError(
            f"{folder} cannot be imported", " ".join(str(error).splitlines()[:3]), "a folder of Qwen2.5 weights", DOCS
        ) from None
    published = _language_model(folder)
    stored = {name: tuple(file.get_slice(own).get_shape()) for name, (_, file, own) in published.items()}
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
