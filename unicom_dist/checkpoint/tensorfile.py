"""Writing safetensors straight from memory, without a copy, and reading slices of them.

The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data. Written
here because the library's writer first turns every tensor into a bytes object, which doubles the memory of a save.
Ref: https://github.com/huggingface/safetensors (format section).
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unicom_dist.config.errors import CheckpointError

_NAMES = {torch.float32: "F32", torch.uint8: "U8", torch.int64: "I64", torch.bfloat16: "BF16"}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """Write contiguous CPU tensors, synced to disk; the bytes written. OSError when there is no space."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            if tensor.numel():
                file.write(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + end


class TensorFile:
    """A safetensors file opened for reading slices; a context manager. CheckpointError when it is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            file: Any = safe_open(str(path), framework="pt")
            self._file = file
            self._names = set(file.keys())
            self.metadata: dict[str, str] = file.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read",
                str(error),
                f"remove {path.parent} to continue from the checkpoint before it",
                "docs/checkpoints.md",
            ) from None

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of a one-dimensional tensor; without bounds the whole tensor, of any shape."""
        if stop is None:
            return self._file.get_tensor(name)  # type: ignore[no-any-return]
        return self._file.get_slice(name)[start:stop]  # type: ignore[no-any-return]
