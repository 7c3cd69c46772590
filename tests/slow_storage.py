"""Run a command while each read of a shard takes longer, as from a network disk: an experiment, see docs/benchmarks.md.

python -m tests.slow_storage MILLISECONDS benchmarks.doctor --shards DIR
"""

import os
import runpy
import sys
import time


def slow_reads(seconds: float) -> None:
    preadv = os.preadv

    def slow(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        time.sleep(seconds)
        return preadv(descriptor, buffers, offset)

    os.preadv = slow  # type: ignore[assignment]


if __name__ == "__main__":
    _, milliseconds, module, *arguments = sys.argv
    slow_reads(float(milliseconds) / 1000)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")
