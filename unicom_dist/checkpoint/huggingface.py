"""The backbone as a Hugging Face folder of Qwen2.5: `config.json` and safetensors, in several files when it is large.

The names of its tensors are transformers' own, so this is a matter of choosing them and describing the architecture.
Reading such folders: `models/published.py`.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unicom_dist.checkpoint.tensorfile import TensorWriter, write_synced
from unicom_dist.config.errors import CheckpointError
from unicom_dist.config.schema import PriorConfig
from unicom_dist.models.published import FIELDS, TABLES

PREFIX = "backbone."
FILE_BYTES = 5 << 30  # what the hub's own files have at most
POSITIONS = 32768  # Qwen2.5's; the rotary embedding itself has no limit


def write_qwen(
    folder: Path,
    prior: PriorConfig,
    tensors: Mapping[str, Tensor],
    special: Mapping[str, int],
    dtype: torch.dtype = torch.bfloat16,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write the backbone among `tensors` into `folder`, one tensor in memory at a time.

    special: rows of the vocabulary by their names in config.json ("eos_token_id", …).
    CheckpointError when there is no backbone, or one that Qwen2.5 cannot be. OSError when there is no space.
    """
    if prior.qk_norm:
        raise CheckpointError(
            "the backbone cannot be exported as Qwen2.5",
            "its queries and keys are normalised (prior.qk_norm), and Qwen2.5 has no such norms",
            "export it in our own form, which keeps them",
            "docs/checkpoints.md",
        )
    names = [name for name in tensors if name.startswith(PREFIX)]
    rows, files, size = 0, dict[str, list[str]](), 0
    with ExitStack() as file:
        room = 0
        for name in names:
            tensor, own = tensors[name].to(dtype), name.removeprefix(PREFIX)
            if own == TABLES[0]:
                rows = tensor.shape[0]
            if tensor.nbytes > room:
                file.close()  # the one before is complete
                part = f"part-{len(files)}"
                writer = file.enter_context(TensorWriter(folder / part, names, {"format": "pt"}))
                files[part], room = [], max(file_bytes, tensor.nbytes)
            writer.add(own, tensor)
            files[part].append(own)
            room, size = room - tensor.nbytes, size + tensor.nbytes
    if not rows:
        raise CheckpointError(
            "there is no backbone to export",
            f"no tensor is called {PREFIX}{TABLES[0]}",
            "name a run or checkpoint of a prior stage",
            "docs/checkpoints.md",
        )
    called = {part: f"model-{number:05d}-of-{len(files):05d}.safetensors" for number, part in enumerate(files, 1)}
    if len(files) == 1:
        called = dict.fromkeys(files, "model.safetensors")
    for part, name in called.items():
        (folder / part).rename(folder / name)
    if len(files) > 1:
        places = {name: called[part] for part, names in files.items() for name in names}
        index = {"metadata": {"total_size": size}, "weight_map": places}
        write_synced(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    content = {**architecture(prior, rows), **special, "torch_dtype": str(dtype).removeprefix("torch.")}
    write_synced(folder / "config.json", json.dumps(content, indent=2) + "\n")


def architecture(prior: PriorConfig, rows: int) -> dict[str, Any]:
    """config.json of the backbone with `rows` rows of the embedding."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "max_position_embeddings": POSITIONS,
        "use_sliding_window": False,
        "vocab_size": rows,
        **{key: getattr(prior, field) for field, key in FIELDS},
        "rope_theta": prior.rope_theta,
        "tie_word_embeddings": prior.tie_embeddings,
    }
