"""Counter-based random numbers: Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).

A number is a function of (key, counter) and of nothing else: no state, no order of evaluation, any number of
threads. Parallax keys the generator by the seed and counts by ``(epoch, sample id, view, draw)``.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

UInt32 = NDArray[np.uint32]

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def key_from_seed(seed: int) -> tuple[int, int]:
    """The 64-bit key of a seed in ``[0, 2**64)``, as (low, high) words."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected 0 <= seed < 2**64, found {seed}")
    return seed & 0xFFFFFFFF, seed >> 32


def philox(key: tuple[int, int], c0: ArrayLike, c1: ArrayLike, c2: ArrayLike, c3: ArrayLike) -> UInt32:
    """Random words for broadcastable counter words ``c0..c3`` (each in ``[0, 2**32)``): shape ``(..., 4)``."""
    x0, x1, x2, x3 = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in (c0, c1, c2, c3)))
    for i in range(_ROUNDS):
        k0, k1 = (np.uint64((k + i * w) & 0xFFFFFFFF) for k, w in zip(key, _WEYL, strict=True))
        p0, p1 = _MULTIPLIERS[0] * x0, _MULTIPLIERS[1] * x2
        x0, x1, x2, x3 = (p1 >> _HALF) ^ x1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ x3 ^ k1, p0 & _LOW
    return np.stack([x0, x1, x2, x3], axis=-1).astype(np.uint32)


def to_unit(words: UInt32) -> NDArray[np.float64]:
    """Words as uniform numbers in ``[0, 1)`` with 32 random bits."""
    return words.astype(np.float64) * 2.0**-32


def to_range(words: UInt32, low: ArrayLike, high: ArrayLike) -> NDArray[np.float64]:
    """Words as uniform numbers in ``[low, high)``."""
    low = np.asarray(low, dtype=np.float64)
    return low + (np.asarray(high, dtype=np.float64) - low) * to_unit(words)


def to_integer(words: UInt32, stop: ArrayLike) -> NDArray[np.int64]:
    """Words as integers in ``[0, stop)``, ``stop <= 2**31``; the bias of one value is below ``stop * 2**-32``."""
    return ((words.astype(np.uint64) * np.asarray(stop).astype(np.uint64)) >> _HALF).astype(np.int64)
