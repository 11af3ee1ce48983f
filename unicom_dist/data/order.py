"""The order of the samples and the randomness of each, as pure functions of what they are keyed by.

`Order` is a pseudo-random permutation evaluated by position (a Feistel network over an even power of two, walking on
while the value is out of range), so that position 10^9 costs as much as position 0: resuming is arithmetic.
Noise, times and choices come from a generator keyed by seed, sample key and visit; ranks and steps play no part.
Ref: Black and Rogaway 2002, "Ciphers with arbitrary finite domains" (cycle walking).
"""

import functools
import hashlib

import numpy as np
import torch
from numpy.typing import NDArray

_ROUNDS = 6
_BLOCK = 1024


def key_of(*parts: object) -> int:
    """A 63-bit key of the parts' texts."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_of(*parts: object) -> torch.Generator:
    """A CPU generator keyed by the parts, e.g. (seed, stage, sample key, visit)."""
    return torch.Generator().manual_seed(key_of(*parts))


class Order:
    """Endless visits of `size` samples: every epoch is another permutation. `order[n]` = (sample number, visit)."""

    def __init__(self, size: int, *key: object) -> None:
        if size < 1:
            raise ValueError("an order needs at least one sample")
        self.size, self._key = size, key
        self._half = max((size - 1).bit_length() + 1, 2) // 2
        self._block = functools.lru_cache(maxsize=4)(self._permuted)

    def __getitem__(self, ordinal: int) -> tuple[int, int]:
        epoch, position = divmod(ordinal, self.size)
        return int(self._block(epoch, position // _BLOCK)[position % _BLOCK]), epoch

    def _permuted(self, epoch: int, block: int) -> NDArray[np.uint64]:
        """The samples at positions [block x 1024, …) of an epoch."""
        values = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, self.size), dtype=np.uint64)
        round_keys = [np.uint64(key_of(*self._key, epoch, r)) for r in range(_ROUNDS)]
        outside = np.ones(len(values), dtype=bool)
        while outside.any():
            values[outside] = self._feistel(values[outside], round_keys)
            outside = values >= self.size
        return values

    def _feistel(self, values: NDArray[np.uint64], round_keys: list[np.uint64]) -> NDArray[np.uint64]:
        half, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = values >> half, values & mask
        for key in round_keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        result: NDArray[np.uint64] = (left << half) | right
        return result


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
