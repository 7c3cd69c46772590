"""A contact sheet of images and their views, as a backend makes them.

python -m pipeline.preview --shards /data/shards --out views.png
python -m pipeline.preview --shards /data/shards --compare cpu torchvision
python -m pipeline.preview --shards s3://bucket/shards --cache-dir /scratch/shards --views runs/simclr/config.yaml
"""

import argparse
import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.views import PRESETS, ViewSpec, parse, preset
from sharding.command import UserError, command

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pipeline.plan import BatchPlan, ViewPlan
    from pipeline.reading.reader import Reader

Picture = NDArray[np.uint8]

_GAIN = 64  # of differences, which are hardly visible otherwise
_OPERATIONS = ("brightness", "contrast", "saturation", "hue")  # BRIGHTNESS to HUE of `pipeline.plan`
_MAX_IMAGES = 200  # rows; Matplotlib's pictures are at most 2**16 pixels high
_CACHE_BYTES = 200 * 10**9


@command("pipeline.preview")
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    figure = draw_sheet(options, read_views(options.views))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kind, kinds = options.out.suffix[1:] or "png", figure.canvas.get_supported_filetypes()
    if kind not in kinds:
        raise UserError(f"--out {options.out}: expected a picture ({', '.join(sorted(kinds))}), found .{kind}")
    figure.savefig(options.out, dpi=150, format=kind)
    print(options.out)
    return 0


def read_views(name: str) -> tuple[ViewSpec, ...]:
    """The views of a preset, or those under ``views:`` in a YAML file such as the config.yaml of a run."""
    if not name.endswith((".yaml", ".yml")):
        return preset(name)
    import yaml

    try:
        tree = yaml.safe_load(Path(name).read_text())
    except yaml.YAMLError as error:
        raise UserError(f"--views {name}: not valid YAML: {' '.join(str(error).split())}") from None
    views = tree.get("views") if isinstance(tree, dict) else None
    if isinstance(views, str):
        return preset(views)
    if not isinstance(views, list) or not views:
        raise UserError(f"--views {name}: expected a section `views`, a list of groups or the name of a preset")
    return parse(views)


def draw_sheet(options: argparse.Namespace, specs: tuple[ViewSpec, ...]) -> "Figure":
    """One row an image: the original with its crops, then each view in the colour of its crop and what was drawn for
    it; for two backends the view of either, and their difference.
    """
    from pipeline.reading.cache import CacheOptions
    from pipeline.reading.reader import Reader
    from sharding.manifest import open_shards

    backends = options.compare or [options.backend]
    cache = CacheOptions(options.cache_dir, _CACHE_BYTES, _CACHE_BYTES) if options.cache_dir else None
    reader = Reader(open_shards(options.shards), cache)
    try:
        plan = make_plan(reader, specs, options)
        made = [make_views(name, reader, plan) for name in backends]
        per_view = len(backends) + bool(options.compare)
        figure, grid = _grid(len(plan), 1 + per_view * len(plan.views))
        figure.suptitle(f"{options.views}, step {options.step}, seed {options.seed}", fontsize=7)
        for row, cells in enumerate(grid):
            _draw_original(cells[0], reader, plan, row)
            for number, view in enumerate(plan.views):
                group = cells[1 + number * per_view :][:per_view]
                pictures = [views[number][row] for views in made]
                for axes, name, picture in zip(group, backends, pictures, strict=False):
                    _show(axes, picture, f"C{number}")
                    axes.set_title(f"view {number}, {view.spec.size} px, {name}", fontsize=6)
                    axes.set_xlabel(describe(view, row), fontsize=5)
                if options.compare:
                    _draw_difference(group[-1], *pictures)
    finally:
        reader.close()
    return figure


def make_plan(reader: "Reader", specs: tuple[ViewSpec, ...], options: argparse.Namespace) -> "BatchPlan":
    """The plan of the first ``--images`` samples of a step, in batches hardly larger than that."""
    from pipeline.loader import lane_shard_sizes, plan_samples
    from pipeline.order import Shuffled

    if not 1 <= options.images <= _MAX_IMAGES:
        raise UserError(f"--images: expected 1 to {_MAX_IMAGES}, found {options.images}")
    if options.step < 0:
        raise UserError(f"--step: expected at least 0, found {options.step}")
    lanes = reader.shards.manifest.num_lanes
    batch_size = -(-options.images // lanes) * lanes
    order = Shuffled(lane_shard_sizes(reader.shards), options.seed, batch_size)
    # Evenly spaced over the batch, so that all lanes show.
    rows = np.linspace(0, batch_size - 1, options.images).round().astype(int)
    ids, epochs = (values[rows] for values in order.ids(options.step))
    return plan_samples(reader.shards, specs, options.seed, options.step, ids, epochs)


def make_views(backend: str, reader: "Reader", plan: "BatchPlan") -> list[Picture]:
    """A view number to its pictures (n, size, size, 3)."""
    import torch

    from pipeline.backends import BackendOptions, UndecodableError, build_backend
    from sharding.manifest import repair_command

    device = torch.device("cuda" if backend == "dali" and torch.cuda.is_available() else "cpu")
    specs = tuple(view.spec for view in plan.views)
    built = build_backend(backend, BackendOptions(reader, specs, len(plan), 2, 1, device))
    try:
        return [view.cpu().numpy() for view in built.submit(plan).result()]
    except UndecodableError as error:
        where = "; ".join(f"{reader.describe(sample)}: {reason}" for sample, reason in error.reasons.items())
        mend = repair_command(reader.shards.directory)
        raise UserError(f"{where}; mend the shards with {mend}, or look at another --step") from None
    finally:
        built.close()


def describe(view: "ViewPlan", row: int) -> str:
    """What was drawn for one view of one image, in the order in which it is applied, a line for each kind."""
    top, left, height, width = view.box[row]
    lines = [f"{width:.0f} x {height:.0f} at {left:.0f}, {top:.0f}" + (", flipped" if view.flip[row] else "")]
    if view.jitter[row]:
        steps = [_describe_jitter(int(op), float(view.factors[row, op])) for op in view.order[row]]
        lines += [", ".join(steps[:2]), ", ".join(steps[2:])]
    rest = ["grey"] * bool(view.grey[row]) + [f"blur {view.sigma[row]:.2f} px"] * bool(view.sigma[row] > 0)
    rest += ["solarized"] * bool(view.solarize[row])
    return "\n".join([*lines, *([", ".join(rest)] if rest else [])])


def _describe_jitter(operation: int, factor: float) -> str:
    name = _OPERATIONS[operation]
    return (
        f"{name} {360 * factor:+.0f}\N{DEGREE SIGN}" if name == "hue" else f"{name} \N{MULTIPLICATION SIGN}{factor:.2f}"
    )


def _grid(rows: int, columns: int) -> tuple["Figure", NDArray[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.7 * columns, 2.0 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _show(axes: "Axes", picture: Picture, color: str = "white") -> None:
    axes.imshow(picture)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color=color, linewidth=1.5)


def _draw_original(axes: "Axes", reader: "Reader", plan: "BatchPlan", row: int) -> None:
    from matplotlib.patches import Rectangle
    from PIL import Image

    sample = int(plan.ids[row])
    with Image.open(io.BytesIO(reader.read(sample).tobytes())) as image:
        _show(axes, np.asarray(image.convert("RGB")))
    for number, view in enumerate(plan.views):
        top, left, height, width = view.box[row]
        axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=f"C{number}", linewidth=1.5))
    label = int(reader.shards.index.label[sample])
    names = reader.shards.manifest.class_names
    axes.set_title(f"{sample}: {names[label] if 0 <= label < len(names) else label}"[:28], fontsize=6)


def _draw_difference(axes: "Axes", first: Picture, second: Picture) -> None:
    difference = np.abs(first.astype(int) - second)
    _show(axes, np.minimum(255, _GAIN * difference).astype(np.uint8))
    axes.set_title(f"difference, {_GAIN} times", fontsize=6)
    axes.set_xlabel(f"mean {difference.mean():.4f}, largest {difference.max()} of 255", fontsize=5)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline.preview", description="Draw images and their views.")
    parser.add_argument("--shards", required=True, help="directory or URL made by sharding.build")
    parser.add_argument("--out", type=Path, default=Path("views.png"), help="picture to write (default: views.png)")
    parser.add_argument(
        "--views", default="simclr", help=f"{', '.join(PRESETS)}, or a YAML file with a section `views`"
    )
    parser.add_argument("--images", type=int, default=8, help="rows of the sheet (default: 8)")
    parser.add_argument("--step", type=int, default=0, help="step whose batch is shown (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order and the views (default: 0)")
    parser.add_argument("--backend", default="cpu", help="who makes the views (default: cpu)")
    parser.add_argument("--cache-dir", type=Path, help="where to keep shards that lie behind a URL")
    parser.add_argument("--compare", nargs=2, metavar="BACKEND", help="two backends side by side, and their difference")
    return parser


if __name__ == "__main__":
    sys.exit(main())
