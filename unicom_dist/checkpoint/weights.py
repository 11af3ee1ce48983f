"""Folders of exported weights: config.json and model.safetensors, and whatever small JSON files belong to the model.

runs/<name>/weights/<stage>/ is replaced as a whole: a reader sees the old folder or the new one. This is what `unicom
sample` and `unicom eval` read; checkpoints are for continuing a run only.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unicom_dist.checkpoint.tensorfile import TensorFile, TensorWriter, write_synced
from unicom_dist.config.errors import CheckpointError
from unicom_dist.config.storage import reason


def export_weights(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    write_more: Callable[[Path], None] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write the folder; floating-point tensors are cast to `dtype`. `write_more(folder)` adds further files.

    Takes one tensor of the mapping at a time, so that those of a checkpoint (`Checkpoint.tensors`) need not fit in
    memory together. CheckpointError when it cannot be written.
    """

    def write(place: Path) -> None:
        with TensorWriter(place / "model.safetensors", tensors.keys(), {"format": "pt"}) as writer:
            for name, tensor in tensors.items():
                writer.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
        write_synced(place / "config.json", json.dumps(config, indent=2) + "\n")
        if write_more is not None:
            write_more(place)

    replace_folder(folder, write)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, then give it the name of `folder`. CheckpointError when it cannot be written."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    old = folder.with_name(f".{folder.name}.old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"weights could not be exported to {folder}", reason(error), "free space or make the folder writable"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_weights_config(folder: Path) -> dict[str, Any]:
    """config.json of an exported folder. CheckpointError when there is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds no exported weights", reason(error), "run the stage that makes them: unicom train RECIPE"
        ) from None
    return config  # type: ignore[no-any-return]


def read_weights(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors) of an exported folder. CheckpointError when it is missing or damaged."""
    return read_weights_config(folder), dict(StoredWeights(folder))


class Chosen(Mapping[str, Tensor]):
    """The tensors of a mapping whose names `wanted` wants, read when they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], wanted: Callable[[str], bool]) -> None:
        self._tensors = tensors
        self._names = dict.fromkeys(name for name in tensors if wanted(name))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of an exported folder, read when they are asked for. CheckpointError when the file is damaged."""

    def __init__(self, folder: Path) -> None:
        self._file = TensorFile(folder / "model.safetensors", "export again: unicom train RECIPE")

    def __getitem__(self, name: str) -> Tensor:
        return self._file.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.names())

    def __len__(self) -> int:
        return len(self._file.names())
