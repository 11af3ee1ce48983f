"""The tensors of a TorchScript archive, read without running any of it.

The archive is a zip: `<name>/data.pkl` says which module holds which tensor, `<name>/data/<n>` are their bytes, and
`<name>/code/` is a program, which is not looked at. The pickle may only build modules, numbers, texts and tensors.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

from unicom_dist.config.errors import DataError


class _Module(dict[str, Any]):
    """A module of the program: its members by name, nothing of what it does."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state)


class _Tensor(NamedTuple):
    storage: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(storage: Any, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> _Tensor:
    return _Tensor(storage, offset, shape, stride)


class _Modules(pickle.Unpickler):
    """Restores modules and where their tensors are; any other object is refused before it is made."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch", "FloatStorage"): "float32",
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name} is not a tensor of float32")
        return known[module, name]

    def persistent_load(self, pid: Any) -> str:
        kind, dtype, number, *_ = pid
        if kind != "storage" or dtype != "float32":
            raise pickle.UnpicklingError(f"{kind} of {dtype} is not a tensor of float32")
        return str(number)


def read_tensors(content: bytes) -> dict[str, np.ndarray]:
    """All tensors by their dotted names, float32. DataError: no such archive, or anything else in its pickle."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            top = archive.namelist()[0].split("/")[0]
            modules = _Modules(io.BytesIO(archive.read(f"{top}/data.pkl"))).load()
            found = dict(_named(modules, ""))
            return {name: _array(archive.read(f"{top}/data/{at.storage}"), at) for name, at in found.items()}
    except (pickle.UnpicklingError, zipfile.BadZipFile, KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError("refused to load a TorchScript archive", str(error), "fetch the package again") from error


def _named(module: Any, prefix: str) -> Any:
    for name, member in module.items():
        if isinstance(member, _Tensor):
            yield prefix + name, member
        elif isinstance(member, _Module):
            yield from _named(member, f"{prefix}{name}.")


def _array(stored: bytes, at: _Tensor) -> np.ndarray:
    """The tensor's own copy of its bytes. ValueError unless it lies there row by row."""
    dense = [math.prod(at.shape[axis + 1 :]) for axis in range(len(at.shape))]
    if [s for s, side in zip(at.stride, at.shape, strict=True) if side > 1] != [
        s for s, side in zip(dense, at.shape, strict=True) if side > 1
    ]:
        raise ValueError(f"a tensor of shape {at.shape} has strides {at.stride}")
    return np.frombuffer(stored, "<f4", math.prod(at.shape), 4 * at.offset).reshape(at.shape).copy()
