"""What this machine can do at most: cores, storage, matrix products, copies; and what a train step asks for."""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import cycle, product
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Turn, rate_of
from benchmarks.stages import finish
from pipeline.reading.reader import Reader
from sharding.manifest import ShardSet

# Dense bf16 FLOP/s of the makers' data sheets, by the name that torch gives
_A100 = dict.fromkeys(("A100-SXM4-40GB", "A100-SXM4-80GB", "A100-PCIE-40GB", "A100 80GB PCIe"), 312e12)
_PEAKS = {**_A100, "H100 80GB HBM3": 989e12, "H100 PCIe": 756e12, "H200": 989e12}
_COPIED_BYTES = 256 << 20
_NUM_READ = 512  # samples


def cores(seconds: float) -> float:
    """How many cores this process really gets, beside other work and below a container's quota."""
    data, threads = bytes(1 << 16), len(os.sched_getaffinity(0))
    start, cpu = time.perf_counter(), time.process_time()

    def compute(_: int) -> None:
        while time.perf_counter() - start < seconds:
            hashlib.sha256(data)  # without the GIL

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(compute, range(threads)))
    return (time.process_time() - cpu) / (time.perf_counter() - start)


def forget(shards: ShardSet) -> None:
    """Drop the shards from the page cache, as far as the file system obeys."""
    for shard in shards.manifest.shards:
        descriptor = os.open(shards.root / shard.path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def reading(shards: ShardSet, num_threads: int, seconds: float) -> Turn:
    """Samples per second that as many threads read as a loader does, ahead: at random and in the order of the disk,
    cold and then warm."""
    count, rng, turn = min(_NUM_READ, len(shards.index)), np.random.default_rng(), {}
    first = rng.integers(len(shards.index) - count + 1)
    orders = {"random": rng.permutation(len(shards.index))[:count], "sequential": np.arange(first, first + count)}
    for (order, ids), state in product(orders.items(), ("cold", "warm")):
        with closing(Reader(shards)) as reader, ThreadPoolExecutor(num_threads) as pool:
            if state == "cold":
                forget(shards)
            queue, start = (iter if state == "cold" else cycle)(ids.tolist()), time.perf_counter()
            reader.read_ahead(ids)
            reads = [pool.submit(_read, reader, queue, start + seconds) for _ in range(num_threads)]
            turn[f"{state} {order}"] = sum(read.result() for read in reads) / (time.perf_counter() - start)
    return turn


def _read(reader: Reader, samples: Iterator[int], end: float) -> int:
    done = 0
    while (not done or time.perf_counter() < end) and (sample := next(samples, None)) is not None:
        reader.read(sample)
        done += 1  # at least one, however busy the machine is
    return done


def arithmetic(device: torch.device, dtype: torch.dtype, seconds: float) -> Turn:
    """FLOP/s of large matrix products, bytes/s read and written by a copy; on a GPU bytes/s copied to it, and FLOP/s of
    its data sheet in bf16, if it is known."""
    size = 8192 if device.type == "cuda" else 1024
    a, b, out = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(3))
    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    work: dict[str, tuple[float, Callable[[], object]]] = {
        "matmul": (2 * size**3, lambda: torch.mm(a, b, out=out)),
        "copy": (2 * _COPIED_BYTES, lambda: target.copy_(source)),
    }
    if device.type == "cuda":
        host = source.cpu().pin_memory()
        work["upload"] = _COPIED_BYTES, lambda: target.copy_(host, non_blocking=True)

    def per_second(amount: float, do: Callable[[], object]) -> float:
        return amount * rate_of(lambda: len([do()]), seconds, 2, finish)["images_per_second"]

    known = data_sheet(torch.cuda.get_device_name(), dtype) if device.type == "cuda" else {}
    return {name: per_second(*job) for name, job in work.items()} | known


class _Traffic(TorchDispatchMode):
    """Bytes that operations read and write, as if nothing stayed in a cache between two of them."""

    num_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if not function.is_view:
            leaves = tree_leaves((args, kwargs, found))
            self.num_bytes += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
        return found


def asked(step: Callable[[], int]) -> dict[str, float]:
    """Of an image in a train step, forward, backward and update: FLOP of convolutions and matrix products (a
    multiplication and an addition are two), and bytes that operations read and write."""
    with FlopCounterMode(display=False) as flops, _Traffic() as traffic:
        images = step()
    return {"FLOP": flops.get_total_flops() / images, "bytes": traffic.num_bytes / images}


def data_sheet(gpu: str, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a GPU in bf16; nothing of one that is not known, or for a different dtype."""
    peak = _PEAKS.get(gpu.removeprefix("NVIDIA "))
    return {"data sheet": peak} if peak and dtype == torch.bfloat16 else {}
