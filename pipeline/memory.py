"""Memory for batches on the host, used again as soon as nothing refers to it.

Fresh memory costs more than what is done with it: the kernel clears each page at its first touch. Normalising two
views of 224 px into it takes 640 us an image, 180 us with torch's huge pages (THP_MEM_ALLOC_ENABLE=1), and 73 us into
memory of before, for which NumPy's arrays ask for huge pages.
"""

import math
import threading
import weakref
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

_MAX_FREE_BYTES = 4 << 30  # beyond that, memory goes back to the system


class Recycler:
    """Hands out tensors; the memory of those that are gone, with all views of them, serves the next of equal size."""

    def __init__(self, max_free_bytes: int = _MAX_FREE_BYTES) -> None:
        self._free: defaultdict[int, list[NDArray[np.uint8]]] = defaultdict(list)
        self._free_bytes, self._max_free_bytes = 0, max_free_bytes
        # Reentrant: garbage may be collected, and so memory given back, while some is being taken.
        self._lock = threading.RLock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """As `torch.empty` on the CPU."""
        memory = self._take(math.prod(shape) * dtype.itemsize)
        handle = memory[:]  # what all tensors and arrays on the memory refer to
        weakref.finalize(handle, self._give_back, memory).atexit = False
        return torch.from_numpy(handle).view(dtype).view(tuple(shape))

    def _take(self, num_bytes: int) -> NDArray[np.uint8]:
        with self._lock:
            if self._free[num_bytes]:
                self._free_bytes -= num_bytes
                return self._free[num_bytes].pop()
        return np.empty(num_bytes, np.uint8)

    def _give_back(self, memory: NDArray[np.uint8]) -> None:
        with self._lock:
            if self._free_bytes + memory.nbytes <= self._max_free_bytes:
                self._free[memory.nbytes].append(memory)
                self._free_bytes += memory.nbytes


recycler = Recycler()  # of this process


def empty_views(shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Uninitialised uint8 on the host, on its way to ``device``. For a GPU in pinned memory of torch's, which is used
    again once the copies from it are done as well; pinning the views later would copy them first."""
    if device.type == "cuda":
        return torch.empty(tuple(shape), dtype=torch.uint8, pin_memory=True)
    return recycler.empty(shape, torch.uint8)
