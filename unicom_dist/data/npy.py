"""Arrays inside shards: `.npy` members read without copying and without ever unpickling.

Headers repeat from sample to sample, so parsed ones are remembered. bfloat16 has no name in the format; it is stored as
two-byte records (`V2`) and comes back as a torch tensor of that type through `to_tensor`.
"""

import ast
import functools
import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unicom_dist.config.errors import DataError

_MAGIC = b"\x93NUMPY"
_DAMAGED = (ValueError, TypeError, KeyError, SyntaxError, IndexError)
_USUAL_HEADER = 128  # numpy pads headers to a multiple of 64 bytes; those of plain arrays take 128
_Header = tuple[np.dtype[np.generic], tuple[int, ...], int, int]  # type, shape, start of the data, bytes of a row


def read_npy(content: memoryview, name: str) -> NDArray[np.generic]:
    """A read-only view of the array in `content`. DataError, naming `name`: damaged, or holds Python objects."""
    try:
        dtype, shape, start, _ = _header(bytes(content[:_USUAL_HEADER])) or _long_header(content)
        return np.ndarray(shape, dtype, content, start)
    except _DAMAGED as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, why: object) -> DataError:
    return DataError(f"{name}: the array cannot be read", str(why), "compute this part again")


@functools.lru_cache(maxsize=4096)
def _header(head: bytes) -> _Header | None:
    """What the first 128 bytes say, or None if the header is longer."""
    if head[:6] != _MAGIC:
        raise ValueError("not a .npy file")
    start = 10 if head[6] == 1 else 12
    end = start + int.from_bytes(head[8:start], "little")
    return _parse(head[start:end], end) if end <= len(head) else None


def _long_header(content: memoryview) -> _Header:
    start = 10 if content[6] == 1 else 12
    end = start + int.from_bytes(content[8:start], "little")
    return _parse(bytes(content[start:end]), end)


def _parse(header: bytes, end: int) -> _Header:
    fields = ast.literal_eval(header.decode("latin-1").strip())
    dtype = np.dtype(fields["descr"])
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which would have to be unpickled")
    if fields["fortran_order"]:
        raise ValueError("it is stored in column order")
    shape = tuple(int(side) for side in fields["shape"])
    return dtype, shape, end, dtype.itemsize * math.prod(shape[1:])


def write_npy(array: NDArray[np.generic]) -> bytes:
    """`array` as the content of a `.npy` member."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def gather(contents: Sequence[memoryview], name_of: Callable[[int], str]) -> Tensor:
    """Arrays [n_i, C] of one type end to end, [sum n_i, C] in the stored precision: one copy, out of the map.

    DataError, with `name_of(i)`: damaged, or of another type or number of channels than the one before.
    """
    parts: list[memoryview] = []
    first: _Header | None = None
    head, start, stop = b"", 0, 0
    for number, content in enumerate(contents):
        try:
            if (other := content[:_USUAL_HEADER].tobytes()) != head or stop > len(content):
                header = _header(other) or _long_header(content)
                first = _check_like(header, first)
                _, shape, start, row = header
                stop = start + shape[0] * row
                if stop > len(content):
                    raise ValueError(f"{len(content)} bytes, its header promises {stop}")
                head = other if start == _USUAL_HEADER else b""
        except _DAMAGED as error:
            raise _unreadable(name_of(number), error) from error
        parts.append(content[start:stop])
    if first is None:
        return torch.zeros(0, 0)
    return _tensor(np.frombuffer(bytearray().join(parts), first[0]).reshape(-1, *first[1][1:]))


def _check_like(header: _Header, first: _Header | None) -> _Header:
    """The header if its array can follow that of `first`."""
    dtype, shape, *_ = header
    if len(shape) != 2 or (first is not None and (dtype, shape[1]) != (first[0], first[1][1])):
        raise ValueError(f"{dtype} {list(shape)}" + (f" does not go with {first[0]} {list(first[1])}" if first else ""))
    return header


def to_tensor(array: NDArray[np.generic]) -> Tensor:
    """A float tensor that owns its memory, in the stored precision."""
    return _tensor(array.copy())


def _tensor(array: NDArray[np.generic]) -> Tensor:
    if array.dtype == np.dtype("V2"):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
