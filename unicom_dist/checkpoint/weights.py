"""Folders of exported weights: config.json and model.safetensors, and whatever small JSON files belong to the model.

runs/<name>/weights/<stage>/ is replaced as a whole: a reader sees the old folder or the new one. This is what `unicom
sample` and `unicom eval` read; checkpoints are for continuing a run only.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from unicom_dist.config.errors import CheckpointError


def export_weights(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    write_more: Callable[[Path], None] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write the folder; floating-point tensors are cast to `dtype`. `write_more(folder)` adds further files.

    CheckpointError when it cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        cast = {
            name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
            for name, tensor in tensors.items()
        }
        save_file(cast, str(temporary / "model.safetensors"), metadata={"format": "pt"})
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if write_more is not None:
            write_more(temporary)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"weights could not be exported to {folder}", str(error), "free space or make the folder writable"
        ) from None


def read_weights_config(folder: Path) -> dict[str, Any]:
    """config.json of an exported folder. CheckpointError when there is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds no exported weights", str(error), "run the stage that makes them: unicom train RECIPE"
        ) from None
    return config  # type: ignore[no-any-return]


def read_weights(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of an exported folder. CheckpointError when it is missing or damaged."""
    config = read_weights_config(folder)
    try:
        return config, load_file(str(folder / "model.safetensors"))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}/model.safetensors cannot be read", str(error), "export again: unicom train RECIPE"
        ) from None
