"""Arrays inside shards: `.npy` members read without copying and without ever unpickling.

Headers repeat from sample to sample, so a parsed one is remembered. bfloat16 has no name in the format; it is stored as
two-byte records (`V2`) and comes back as a torch tensor of that type through `to_tensor`.
"""

import ast
import functools
import io
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unicom_dist.config.errors import DataError

_MAGIC = b"\x93NUMPY"


def read_npy(content: memoryview, name: str) -> NDArray[np.generic]:
    """A read-only view of the array in `content`. DataError, naming `name`: damaged, or holds Python objects."""
    try:
        if bytes(content[:6]) != _MAGIC:
            raise ValueError("not a .npy file")
        start = 10 if content[6] == 1 else 12
        end = start + int.from_bytes(content[8:start], "little")
        dtype, shape, count = _parse(bytes(content[start:end]))
        return np.frombuffer(content, dtype, count, end).reshape(shape)
    except (ValueError, TypeError, KeyError, SyntaxError, IndexError) as error:
        raise DataError(f"{name}: the array cannot be read", str(error), "compute this part again") from error


@functools.lru_cache(maxsize=4096)
def _parse(header: bytes) -> tuple[np.dtype[np.generic], tuple[int, ...], int]:
    fields = ast.literal_eval(header.decode("latin-1").strip())
    dtype = np.dtype(fields["descr"])
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which would have to be unpickled")
    if fields["fortran_order"]:
        raise ValueError("it is stored in column order")
    shape = tuple(int(side) for side in fields["shape"])
    return dtype, shape, math.prod(shape)


def write_npy(array: NDArray[np.generic]) -> bytes:
    """`array` as the content of a `.npy` member."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def to_tensor(array: NDArray[np.generic]) -> Tensor:
    """A float tensor that owns its memory, in the stored precision."""
    if array.dtype == np.dtype("V2"):
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
