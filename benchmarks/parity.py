"""How far the views of the backends are from torchvision's, in grey levels of 255.

    python -m benchmarks.parity                                            # generated images
    python -m benchmarks.parity --shards /data/shards --images 128 --backends cpu dali

The reference is Pillow and torchvision's functional operations, with the same parameters on the same images. Single
operations follow a crop; chains are whole presets. Exit code 1: over tolerance.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from pipeline.backends import BACKENDS, BackendOptions, Views, build_backend
from pipeline.canary import CHAIN_TOLERANCE, WORST_IMAGE_TOLERANCE
from pipeline.loader import plan_samples
from pipeline.plan import BRIGHTNESS, CONTRAST, HUE, SATURATION, BatchPlan, ViewPlan
from pipeline.reading.reader import Reader
from pipeline.views import PRESETS, ViewSpec, preset
from sharding.command import UserError, command
from sharding.manifest import ShardSet, open_shards, repair_command

OPERATION_TOLERANCE = 0.5  # mean absolute difference in levels of all images; those of chains are the canary's

References = list[NDArray[np.uint8]]  # a (n, size, size, 3) per view


@dataclass(frozen=True, eq=False)
class Case:
    """One row of the table: a plan, and the mean difference that is accepted."""

    name: str
    plan: BatchPlan
    tolerance: float


@dataclass(frozen=True)
class Difference:
    mean: float
    worst_image: float  # the largest mean of an image
    largest: int  # of a single value

    def __str__(self) -> str:
        return f"{self.mean:.5f}  {self.worst_image:.4f}  {self.largest}"

    def exceeds(self, tolerance: float) -> bool:
        return self.mean > tolerance or self.worst_image > WORST_IMAGE_TOLERANCE


@command("benchmarks.parity")
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    with ExitStack() as stack:
        if options.images < 1:
            raise UserError(f"--images: expected at least 1, found {options.images}")
        shards = open_shards(options.shards or _generated_shards(stack, options.images))
        results = measure(shards, options.backends, options.images)
    return _report(results, options.backends)


def measure(shards: ShardSet, backends: Sequence[str], num_images: int) -> dict[Case, dict[str, Difference]]:
    """The difference of every case and backend, on images spread over the data."""
    ids = np.linspace(0, shards.manifest.num_samples - 1, num_images).round().astype(np.int64)
    results: dict[Case, dict[str, Difference]] = {}
    for cases in (_operations(shards, ids), *([_chain(shards, ids, name)] for name in PRESETS)):
        references = {case: _reference(shards, case.plan) for case in cases}
        results |= {case: {} for case in cases}
        for name in backends:
            for case, views in _views(shards, name, cases):
                results[case][name] = compare(views, references[case])
    return results


def compare(views: Views, references: References) -> Difference:
    """Over all views of a batch."""
    images, largest = [], 0
    for view, reference in zip(views, references, strict=True):
        difference = np.abs(view.cpu().numpy().astype(np.int16) - reference)
        images.append(difference.mean(axis=(1, 2, 3)))
        largest = max(largest, int(difference.max()))
    means = np.concatenate(images)
    return Difference(float(means.mean()), float(means.max()), largest)


def _operations(shards: ShardSet, ids: NDArray[np.int64]) -> list[Case]:
    """A crop, and each operation alone after it, with the parameters that a SimCLR view draws."""
    spec = ViewSpec(jitter=1.0, grey=1.0, blur=1.0, solarize=1.0)
    drawn = plan_samples(shards, (spec,), 0, 0, ids, np.zeros_like(ids))
    (view,) = drawn.views
    off = np.zeros(len(ids), bool)
    crop = replace(view, flip=off, jitter=off, grey=off, sigma=np.zeros_like(view.sigma), solarize=off)
    plans: Mapping[str, ViewPlan] = {
        "crop and resize": crop,
        "flip": replace(crop, flip=~off),
        "brightness": _jitter(crop, BRIGHTNESS),
        "contrast": _jitter(crop, CONTRAST),
        "saturation": _jitter(crop, SATURATION),
        "hue": _jitter(crop, HUE),
        "jitter in random order": replace(crop, jitter=~off),
        "grey": replace(crop, grey=~off),
        "blur": replace(crop, sigma=view.sigma),
        "solarize": replace(crop, solarize=~off),
    }
    tolerances = {"jitter in random order": CHAIN_TOLERANCE}
    return [
        Case(name, replace(drawn, views=(plan,)), tolerances.get(name, OPERATION_TOLERANCE))
        for name, plan in plans.items()
    ]


def _jitter(plan: ViewPlan, operation: int) -> ViewPlan:
    """One operation of colour jitter, the others neutral."""
    factors = np.tile(np.array([1, 1, 1, 0], np.float32), (len(plan), 1))
    factors[:, operation] = plan.factors[:, operation]
    return replace(plan, jitter=np.ones(len(plan), bool), factors=factors)


def _chain(shards: ShardSet, ids: NDArray[np.int64], name: str) -> Case:
    return Case(name, plan_samples(shards, preset(name), 0, 0, ids, np.zeros_like(ids)), CHAIN_TOLERANCE)


def _reference(shards: ShardSet, plan: BatchPlan) -> References:
    from pipeline.backends.torchvision import apply

    reader = Reader(shards)
    images = [_decode(reader, int(sample)) for sample in plan.ids]
    return [np.stack([np.asarray(apply(image, view, row)) for row, image in enumerate(images)]) for view in plan.views]


def _decode(reader: Reader, sample: int) -> Image:
    from pipeline.backends.torchvision import decode

    try:
        return decode(reader.read(sample))
    except ValueError as error:
        mend = repair_command(reader.shards.directory)
        raise UserError(f"{reader.describe(sample)}: {error}; mend the shards with {mend}") from None


def _views(shards: ShardSet, backend: str, cases: Sequence[Case]) -> Iterator[tuple[Case, Views]]:
    """A backend's views of cases, which have the same specs."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = cases[0].plan
    specs = tuple(view.spec for view in plan.views)
    options = BackendOptions(Reader(shards), specs, len(plan), num_threads=2, prefetch=1, device=device)
    with closing(build_backend(backend, options)) as made:
        for case in cases:
            yield case, made.submit(case.plan).result()


def _report(results: Mapping[Case, Mapping[str, Difference]], backends: Sequence[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    title = "difference to torchvision, levels of 255: mean, worst image, largest of a value"
    table = Table("", "tolerance", *backends, title=title, title_justify="left")
    failed = False
    for case, differences in results.items():
        cells = []
        for difference in differences.values():
            over = difference.exceeds(case.tolerance)
            failed |= over
            cells.append(f"[red]{difference} over[/red]" if over else str(difference))
        table.add_row(case.name, f"{case.tolerance}  {WORST_IMAGE_TOLERANCE}", *cells)
    Console().print(table)
    if failed:
        print("benchmarks.parity: over tolerance", file=sys.stderr)
    return int(failed)


def _generated_shards(stack: ExitStack, num_images: int) -> Path:
    """Shards of textured images, larger and smaller than views, in a temporary directory."""
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    from sharding.build import main as build

    directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    print("no --shards: comparing on generated images")
    images = [{"bytes": _textured(number), "path": None} for number in range(num_images)]
    (directory / "source" / "data").mkdir(parents=True)
    data = Dataset.from_dict({"image": images}, features=Features({"image": ImageFeature()}))
    data.to_parquet(directory / "source" / "data" / "train-00000-of-00001.parquet")
    out = directory / "shards"
    if code := build(["--dataset", str(directory / "source"), "--out", str(out), "--lanes", "1", "--workers", "1"]):
        raise UserError(f"the generated images could not be built into shards (exit code {code})")
    return out


def _textured(number: int) -> bytes:
    """A JPEG of waves of many lengths, edges and noise, saturated here and there; each third has halved chroma."""
    import simplejpeg

    rng = np.random.default_rng(number)
    height, width = rng.integers(120, 520, 2)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = np.zeros((height, width, 3))
    for length in (3, 8, 30, 90, 300):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        wave = np.sin((rows * np.sin(angle) + columns * np.cos(angle)) * 2 * np.pi / length + phase)
        waves += (wave > 0.3 if length == 90 else wave)[..., None] * rng.uniform(-50, 50, 3)
    pixels = rng.uniform(40, 215, 3) + waves + rng.normal(0, 8, waves.shape)
    subsampling = "420" if number % 3 == 0 else "444"
    return simplejpeg.encode_jpeg(np.clip(pixels, 0, 255).astype(np.uint8), 90, colorsubsampling=subsampling)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity", description="Compare the backends' views with torchvision's."
    )
    parser.add_argument("--shards", help="directory made by sharding.build (default: generated images)")
    parser.add_argument("--images", type=int, default=32, help="how many, spread over the data (default: 32)")
    parser.add_argument("--backends", nargs="+", choices=list(BACKENDS), default=["cpu", "dali"])
    return parser


if __name__ == "__main__":
    sys.exit(main())
