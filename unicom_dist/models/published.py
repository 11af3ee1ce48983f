"""Published Qwen2.5 folders into the backbone: `config.json` and one or several safetensors files.

Only safetensors are read, tensor by tensor. With a trimmed vocabulary the rows of the tables are picked by source id.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from unicom_dist.config.errors import CheckpointError, ConfigError
from unicom_dist.config.schema import PriorConfig
from unicom_dist.models.backbone import Qwen2

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
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def load_published(backbone: Qwen2, config: PriorConfig, source_ids: Sequence[int]) -> None:
    """Fill `backbone` from `config.init_from`; `source_ids[row]` is the published id of each vocabulary row.

    ConfigError: the recipe describes another model. CheckpointError: files missing, damaged or without a tensor.
    """
    folder = Path(config.init_from)
    check_architecture(config, folder)
    rows = torch.tensor(source_ids)
    wanted = dict(backbone.named_parameters())  # a tied head is the embedding and is not listed twice
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file, torch.no_grad():
                for name in wanted.keys() & set(file.keys()):
                    stored = file.get_tensor(name)
                    if name in TABLES:
                        check_rows(rows, stored.shape[0], folder)
                        stored = stored[rows]
                    wanted.pop(name).copy_(stored)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {path}", str(error).splitlines()[0], "fetch the file again") from error
    if wanted:
        raise CheckpointError(
            f"{folder} lacks {len(wanted)} tensors, first {min(wanted)}",
            "the model would start from a mixture of published and random weights",
            "a folder with all *.safetensors of the model",
        )


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


def check_rows(rows: torch.Tensor, stored: int, folder: Path) -> None:
    """CheckpointError if the vocabulary needs rows the published table lacks."""
    if int(rows.max()) >= stored:
        raise CheckpointError(
            f"the vocabulary needs row {int(rows.max())} of the embedding",
            f"{folder} has {stored} rows: its tokenizer is another one",
            "prior.tokenizer of the same model as prior.init_from",
        )
