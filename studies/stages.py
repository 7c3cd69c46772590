"""CPU time of what the `cpu` backend does to an image, beside decoding alone, on one thread.

    OMP_NUM_THREADS=1 python -m studies.stages SHARDS --rounds 9

Each round takes 192 images through one stage after the other. Medians and ranges of rounds.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pipeline.backends.cpu import Decoder
from pipeline.kernels import photometric
from pipeline.kernels.render import render
from pipeline.kernels.resample import resample
from pipeline.plan import plan_samples
from pipeline.reading.reader import Reader
from pipeline.transfer import to_batch
from pipeline.views import preset
from sharding.manifest import open_shards

_IMAGES = 192


def one_round(reader: Reader, number: int) -> dict[str, float]:
    spent: defaultdict[str, float] = defaultdict(float)

    def timed(stage: str, function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.thread_time()
        result = function(*arguments)
        spent[stage] += time.thread_time() - start
        return result

    ids = np.random.default_rng(number).permutation(len(reader.shards.index))[:_IMAGES]
    plan = timed("planning", plan_samples, reader.shards, preset("simclr"), number, 0, ids, np.zeros_like(ids))
    outs = [np.ones((len(ids), 224, 224, 3), np.uint8) for _ in plan.views]  # no page faults later
    decode, view = Decoder(), np.empty((3, 224, 224), np.uint8)
    for row in range(len(ids)):
        size = int(plan.heights[row]), int(plan.widths[row])
        data = timed("reading, checksum", reader.read, int(ids[row]))
        image = timed("decoding", decode, data, *size)
        for v, out in zip(plan.views, outs, strict=True):
            geometry = v.box[row], v.edge[row], v.flip[row], False, view
            timed("resizing", resample, image, 0, 0, *geometry)
            colours = v.jitter[row], v.order[row], v.factors[row], v.grey[row], v.sigma[row], 23, v.solarize[row]
            copy = view.copy()
            timed("photometric", photometric.adjust, view, *colours, out[row])
            if v.sigma[row]:
                timed("of that blur", photometric.blur, copy[:1] if v.grey[row] else copy, v.sigma[row], 23)
            if v.jitter[row]:
                timed("of that jitter", photometric._jitter, copy, v.order[row], v.factors[row])
    views = [torch.from_numpy(out) for out in outs]
    timed("normalising", to_batch, views, plan, torch.device("cpu"), torch.float32)

    def whole() -> None:
        for row in range(len(ids)):
            size = int(plan.heights[row]), int(plan.widths[row])
            image = decode(reader.read(int(ids[row])), *size)
            for v, out in zip(plan.views, outs, strict=True):
                render(image, v, row, out[row])

    timed("all of it, at once", whole)
    spent["all of it, at once"] += spent["normalising"] + spent["planning"]
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    reader = Reader(open_shards(args.shards))
    rounds = [one_round(reader, number) for number in range(args.rounds + 1)][1:]  # the first compiles
    for stage in rounds[0]:
        us = np.array([spent[stage] for spent in rounds]) / _IMAGES * 1e6
        print(f"{stage:20s} {np.median(us):7.0f} ({us.min():.0f} to {us.max():.0f})")
    ratios = [(s["decoding"] + s["reading, checksum"]) / s["all of it, at once"] for s in rounds]
    print(f"reading and decoding over all of it: {np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    reader.close()


if __name__ == "__main__":
    main()
