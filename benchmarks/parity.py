"""How far the views of the backends are from torchvision's, in grey levels of 255.

    python -m benchmarks.parity    # generated images; --shards DIR for those of a data set

The reference is the `torchvision` backend, with the same parameters on the same images. Single operations follow a
crop; chains are whole presets. Exit code 1: over tolerance.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch

from benchmarks.generated import generated_shards
from benchmarks.report import show
from benchmarks.stages import device
from pipeline.backends import BACKENDS
from pipeline.canary import CHAIN_TOLERANCE, WORST_IMAGE_TOLERANCE
from pipeline.loader import Loader
from pipeline.order import Sequential
from pipeline.views import PRESETS, ViewSpec, flatten, in_levels, parse, preset
from sharding.command import Parser, UserError, command
from sharding.manifest import ShardSet, open_shards
from sharding.progress import steps

OPERATION_TOLERANCE = 0.5  # mean absolute difference in levels of all images; those of chains are the canary's
_BATCH_SIZE = 4  # images, each with the views of all cases

_OFF = {"flip": 0.0, "jitter": 0.0, "grey": 0.0, "blur": 0.0, "solarize": 0.0}
_NEUTRAL_JITTER = {"jitter": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
# A crop, and each operation alone after it, with the parameters that a SimCLR view draws
_OPERATIONS: Mapping[str, Mapping[str, Any]] = {
    "crop, bilinear": {},
    "crop, bicubic": {"interpolation": "bicubic"},
    "centre crop, bilinear": {"crop": "center"},
    "centre crop, bicubic": {"crop": "center", "interpolation": "bicubic"},
    "flip": {"flip": 1.0},
    "brightness": {**_NEUTRAL_JITTER, "brightness": 0.8},
    "contrast": {**_NEUTRAL_JITTER, "contrast": 0.8},
    "saturation": {**_NEUTRAL_JITTER, "saturation": 0.8},
    "hue": {**_NEUTRAL_JITTER, "hue": 0.2},
    "grey": {"grey": 1.0},
    "blur": {"blur": 1.0},
    "solarize": {"solarize": 1.0},
}


@dataclass(frozen=True)
class Case:
    """One row of the table: views, and the mean difference that is accepted."""

    name: str
    specs: tuple[ViewSpec, ...]
    tolerance: float


CASES = (
    *(Case(name, parse([{**_OFF, **fields}]), OPERATION_TOLERANCE) for name, fields in _OPERATIONS.items()),
    Case("jitter in random order", parse([{**_OFF, "jitter": 1.0}]), CHAIN_TOLERANCE),
    *(Case(name, preset(name), CHAIN_TOLERANCE) for name in PRESETS),
)


@dataclass(frozen=True)
class Difference:
    """Between the views of two backends, in levels of 255."""

    images: tuple[float, ...] = ()  # the mean of each view of each image
    largest: int = 0  # of a single value

    def __add__(self, other: "Difference") -> "Difference":
        return Difference(self.images + other.images, max(self.largest, other.largest))

    @property
    def mean(self) -> float:
        return fmean(self.images)

    def __str__(self) -> str:
        return f"{self.mean:.5f}  {max(self.images):.4f}  {self.largest}"

    def exceeds(self, tolerance: float) -> bool:
        return self.mean > tolerance or max(self.images) > WORST_IMAGE_TOLERANCE


@command("benchmarks.parity")
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    with ExitStack() as stack:
        if options.images < 1:
            raise UserError(f"--images: expected at least 1, found {options.images}")
        shards = open_shards(options.shards or generated_shards(stack, options.images, lanes=1))
        results = measure(shards, options.backends, options.images)
    return _report(results, options.backends)


def measure(shards: ShardSet, backends: Sequence[str], num_images: int) -> dict[Case, dict[str, Difference]]:
    """The difference of every case and backend, on images spread over the data."""
    ids = np.linspace(0, shards.manifest.num_samples - 1, num_images).round().astype(np.int64)
    order = Sequential(ids, _BATCH_SIZE)
    results: dict[Case, dict[str, Difference]] = {case: {} for case in CASES}
    with ExitStack() as stack:
        loaders = [stack.enter_context(_loader(shards, order, name)) for name in (*backends, "torchvision")]
        for *others, reference in steps(zip(*loaders, strict=True), "comparing", order.num_steps):
            for name, batch in zip(backends, others, strict=True):
                start = 0
                for case, differences in results.items():
                    views = slice(start, start := start + len(flatten(case.specs)))
                    found = compare(batch.views[views], reference.views[views])
                    differences[name] = differences.get(name, Difference()) + found
    return results


def compare(views: Sequence[torch.Tensor], references: Sequence[torch.Tensor]) -> Difference:
    """Of views (n, 3, size, size) in levels of 255."""
    differences = [(view - reference).abs() for view, reference in zip(views, references, strict=True)]
    means = torch.cat([difference.mean(dim=(1, 2, 3)) for difference in differences])
    return Difference(tuple(means.tolist()), max(int(difference.max()) for difference in differences))


def _loader(shards: ShardSet, order: Sequential, backend: str) -> Loader:
    """The views of all cases in levels, of images of which none may be damaged."""
    specs = in_levels([spec for case in CASES for spec in case.specs])
    return Loader(
        shards,
        specs,
        seed=0,
        order=order,
        backend=backend,
        num_threads=1,
        prefetch=1,
        max_replaced_samples=0,
        device=device(),
    )


def _report(results: Mapping[Case, Mapping[str, Difference]], backends: Sequence[str]) -> int:
    failed, rows = False, []
    for case, differences in results.items():
        cells = []
        for difference in differences.values():
            over = difference.exceeds(case.tolerance)
            failed |= over
            cells.append(f"[red]{difference} over[/red]" if over else str(difference))
        rows.append([case.name, f"{case.tolerance}  {WORST_IMAGE_TOLERANCE}", *cells])
    title = "difference to torchvision, levels of 255: mean, worst image, largest of a value"
    show(title, ["", "tolerance", *backends], rows)
    if failed:
        print("benchmarks.parity: over tolerance", file=sys.stderr)
    return int(failed)


def _parser() -> Parser:
    parser = Parser("python -m benchmarks.parity", "Compare the backends' views with torchvision's.")
    parser.add_argument("--shards", help="directory made by sharding.build (default: generated images)")
    parser.add_argument("--images", type=int, default=32, help="how many, spread over the data (default: 32)")
    parser.add_argument("--backends", nargs="+", choices=list(BACKENDS), default=["cpu", "dali"])
    return parser


if __name__ == "__main__":
    sys.exit(main())
