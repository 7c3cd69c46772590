"""Random numbers of a model, as pure a function of (seed, step, sample ids) as its batches are.

Whatever a method draws in training (masks, dropped paths, slices) comes from here, never from torch's generators: then
a resumed run draws what it would have drawn, on any number of processes, on any device, and a piece of a batch draws
what it draws within the batch.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from pipeline.random import MODEL_STREAM, key_from_seed

_LOW = 0xFFFFFFFF
_NAMES = 1 << 28  # streams; a name's is its CRC-32, so two names of a method collide with probability 4e-9
_SHARED = _NAMES  # added to the stream of what all samples share


@dataclass(frozen=True)
class Draws:
    """The draws of one step for the samples ``ids`` (b,) int64, on their device.

    Each draw has a ``name``, by which it is independent of all others: draw each name once a step.
    """

    seed: int
    step: int
    ids: torch.Tensor

    def uniform(self, name: str, *shape: int) -> torch.Tensor:
        """(b, *shape) float32, uniform in [0, 1): a row a sample, whatever the rest of the batch is."""
        return self._units(_stream(name), self.ids, shape)

    def normal(self, name: str, *shape: int) -> torch.Tensor:
        """(b, *shape) float32, standard normal: a row a sample."""
        return _normal(self.uniform(name, 2, *shape))

    def permutation(self, name: str, size: int) -> torch.Tensor:
        """(b, size) int64: a permutation of ``range(size)`` for each sample."""
        return self.uniform(name, size).argsort(dim=1, stable=True)

    def shared_uniform(self, name: str, *shape: int) -> torch.Tensor:
        """``shape`` float32, uniform in [0, 1): the same on all ranks and for all pieces of a batch."""
        return self._units(_SHARED + _stream(name), self.ids.new_zeros(1), shape)[0]

    def shared_normal(self, name: str, *shape: int) -> torch.Tensor:
        """``shape`` float32, standard normal: the same on all ranks and for all pieces of a batch."""
        return _normal(self.shared_uniform(name, 2, *shape)[None])[0]

    def rows(self, rows: slice) -> "Draws":
        """The draws of a part of the samples."""
        return replace(self, ids=self.ids[rows])

    def _units(self, stream: int, ids: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        count = math.prod(shape)
        blocks = torch.arange(-(-count // 4), device=ids.device)
        words = philox(key_from_seed(self.seed), self.step, ids[:, None], MODEL_STREAM + stream, blocks)
        units = (words.flatten(1)[:, :count] >> 8).float() * 2.0**-24  # the bits that a float32 holds, so below 1
        return units.view(-1, *shape)


def philox(key: tuple[int, int], c0: int | torch.Tensor, c1: torch.Tensor, c2: int, c3: torch.Tensor) -> torch.Tensor:
    """`pipeline.random.philox` on the device of ``c1``: words in [0, 2**32), int64, of shape (..., 4).

    Products of two words wrap around in int64, which leaves all of their 64 bits right.
    """
    c1, c3 = torch.broadcast_tensors(c1, c3)
    a, b, c, d = torch.zeros_like(c1) + c0, c1, torch.full_like(c1, c2), c3
    k0, k1 = key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) & _LOW ^ b ^ k0, q & _LOW, (p >> 32) & _LOW ^ d ^ k1, p & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return torch.stack([a, b, c, d], dim=-1)


@torch.compiler.assume_constant_result  # of a name; torch.compile would break its graph at zlib
def _stream(name: str) -> int:
    return zlib.crc32(name.encode()) % _NAMES


def _normal(units: torch.Tensor) -> torch.Tensor:
    """Box and Muller's transform of (n, 2, ...) uniform numbers, in float64, so that devices agree to rounding."""
    u, v = units.double().unbind(1)
    return ((-2 * torch.log1p(-u)).sqrt() * torch.cos(2 * torch.pi * v)).float()
