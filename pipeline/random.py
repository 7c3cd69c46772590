"""Counter-based random numbers: Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).

A number is a function of (key, counter) and of nothing else: no state, no order of evaluation, any number of
threads. The key is the seed; the counter's four words are, for

| draws of | 0 | 1 | 2 | 3 |
|---|---|---|---|---|
| a view (`pipeline.plan`) | pass over the data | sample id | number of the view | which draw |
| the model (`train.model.draws`) | step | sample id, or 0 | `MODEL_STREAM` + stream of the name | block of 4 words |
| a choice of samples (`train.evaluate.data`) | 0 | half of the position | `CHOICE_STREAM` + class | Feistel round |
| a replacement (`pipeline.order`) | pass | sample id | `REPLACEMENT_STREAM` | attempt |
| the order (`pipeline.order`) | pass | half of the position | `ORDER_STREAM` + window and lane | Feistel round |
"""

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from sharding.command import UserError

UInt32 = NDArray[np.uint32]
Word = np.uint64  # that holds 32 bits

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
MODEL_STREAM = 1 << 30  # to 2**30 + 2**29
CHOICE_STREAM = MODEL_STREAM + (1 << 29)  # and above
REPLACEMENT_STREAM = (1 << 31) - 1
ORDER_STREAM = 1 << 31  # and above

_ROUNDS = 10
_FEISTEL_ROUNDS = 8
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def key_from_seed(seed: int) -> tuple[int, int]:
    """The 64-bit key of a seed in ``[0, 2**64)``, as (low, high) words."""
    if not 0 <= seed < 2**64:
        raise UserError(f"seed: expected 0 <= seed < 2**64, found {seed}")
    return seed & 0xFFFFFFFF, seed >> 32


def philox(key: tuple[int, int], c0: ArrayLike, c1: ArrayLike, c2: ArrayLike, c3: ArrayLike) -> UInt32:
    """Random words for broadcastable counter words ``c0..c3`` (each in ``[0, 2**32)``): shape ``(..., 4)``."""
    counters = np.broadcast_arrays(*(np.asarray(c, dtype=np.uint64) for c in (c0, c1, c2, c3)))
    words = np.empty((*counters[0].shape, 4), dtype=np.uint32)
    flat0, flat1, flat2, flat3 = (c.flatten() for c in counters)
    _fill(Word(key[0]), Word(key[1]), flat0, flat1, flat2, flat3, words.reshape(-1, 4))
    return words


@njit(nogil=True, cache=True)
def philox_block(k0: Word, k1: Word, c0: Word, c1: Word, c2: Word, c3: Word) -> tuple[Word, Word, Word, Word]:
    """`philox` for compiled code: the four words of one counter."""
    for _ in range(_ROUNDS):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


@njit(nogil=True, cache=True)
def _fill(
    k0: Word,
    k1: Word,
    c0: NDArray[np.uint64],
    c1: NDArray[np.uint64],
    c2: NDArray[np.uint64],
    c3: NDArray[np.uint64],
    words: UInt32,
) -> None:
    for i in range(len(words)):
        words[i, 0], words[i, 1], words[i, 2], words[i, 3] = philox_block(k0, k1, c0[i], c1[i], c2[i], c3[i])


def permute(
    positions: NDArray[np.int64], size: int, key: tuple[int, int], stream: int, epoch: int
) -> NDArray[np.int64]:
    """Images of ``positions`` under a pseudo-random permutation of ``range(size)`` chosen by (key, stream, epoch).

    A Feistel network over the next even power of two with Philox as its round function, walked until the value
    falls inside the range (Black & Rogaway, "Ciphers with arbitrary finite domains", 2002): constant memory, any
    position at any time. ``stream`` is a counter word. It stands here beside the generator because Numba's cache of
    compiled code would not notice a change in a function of another file.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    values = np.asarray(positions, dtype=np.uint64).copy()
    k0, k1 = Word(key[0]), Word(key[1])
    _walk(values, Word(size), Word(half_bits), k0, k1, Word(epoch), Word(stream))
    return values.astype(np.int64)


@njit(nogil=True, cache=True)
def _walk(
    values: NDArray[np.uint64], size: Word, half_bits: Word, k0: Word, k1: Word, epoch: Word, stream: Word
) -> None:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    for i in range(len(values)):
        value = values[i]
        while True:
            left, right = value >> half_bits, value & mask
            for j in range(_FEISTEL_ROUNDS):
                word = philox_block(k0, k1, epoch, right, stream, np.uint64(j))[0]
                left, right = right, left ^ (word & mask)
            value = left << half_bits | right
            if value < size:
                break
        values[i] = value


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
