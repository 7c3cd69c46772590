"""A contact sheet of images and their views, as a backend makes them.

python -m pipeline.preview --shards /data/shards --out views.png
python -m pipeline.preview --shards /data/shards --compare cpu torchvision
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

from pipeline.views import PRESETS, ViewSpec, preset

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pipeline.plan import BatchPlan, ViewPlan
    from sharding.manifest import ShardSet

Picture = NDArray[np.uint8]

_OPERATIONS = ("brightness", "contrast", "saturation", "hue")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        specs = read_views(options.views)
        draw_sheet(options, specs)
    except (ValueError, OSError, ImportError) as error:
        print(f"pipeline.preview: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


def read_views(name: str) -> tuple[ViewSpec, ...]:
    """The views of a preset, or those under ``views:`` in a YAML file such as the config.yaml of a run."""
    if not name.endswith((".yaml", ".yml")):
        return preset(name)
    import yaml

    tree = yaml.safe_load(Path(name).read_text())
    if not isinstance(tree, dict) or "views" not in tree:
        raise ValueError(f"--views {name}: expected a YAML file with a section `views`")
    views = tree["views"]
    return preset(views) if isinstance(views, str) else tuple(ViewSpec.model_validate(group) for group in views)


def draw_sheet(options: argparse.Namespace, specs: tuple[ViewSpec, ...]) -> None:
    """One row an image: the original with its crops, then its views and what was drawn for them."""
    from sharding.manifest import open_shards

    shards = open_shards(options.shards)
    backends = options.compare or [options.backend]
    made = {name: make_batch(shards, specs, options, name) for name in backends}
    plan = made[backends[0]][0]
    columns = [(name, view) for view in range(len(plan.views)) for name in backends]
    figure, grid = _grid(len(plan), 1 + len(columns) + (len(plan.views) if options.compare else 0))
    for row in range(len(plan)):
        _draw_original(grid[row, 0], shards, plan, row)
        for column, (name, view) in enumerate(columns, start=1):
            _show(grid[row, column], made[name][1][view][row])
            grid[row, column].set_title(f"{name}, view {view}", fontsize=6)
            grid[row, column].set_xlabel(describe(plan.views[view], row), fontsize=5)
        if options.compare:
            for view in range(len(plan.views)):
                pair = [made[name][1][view][row].astype(int) for name in backends]
                _draw_difference(grid[row, 1 + len(columns) + view], pair[0], pair[1])
    figure.savefig(options.out, dpi=150)


def make_batch(
    shards: "ShardSet", specs: tuple[ViewSpec, ...], options: argparse.Namespace, backend: str
) -> tuple["BatchPlan", list[Picture]]:
    """The plan and the uint8 views (n, size, size, 3) of the first ``--images`` samples of a step."""
    import torch

    from pipeline.backends import BackendOptions, build_backend
    from pipeline.loader import lane_shard_sizes, plan_samples
    from pipeline.order import Order
    from pipeline.reader import Reader
    from pipeline.views import flatten

    lanes = shards.manifest.num_lanes
    batch_size = -(-options.images // lanes) * lanes
    order = Order(lane_shard_sizes(shards), options.seed, batch_size)
    ids, epochs = (values[: options.images] for values in order.ids(options.step))
    plan = plan_samples(shards, specs, options.seed, options.step, ids, epochs)
    device = torch.device("cuda" if backend == "dali" and torch.cuda.is_available() else "cpu")
    built = build_backend(backend, BackendOptions(Reader(shards), flatten(specs), len(plan), 2, 1, device))
    try:
        views = [view.cpu().numpy() for view in built.submit(plan).result()]
    finally:
        built.close()
    return plan, views


def describe(view: "ViewPlan", row: int) -> str:
    """What was drawn for one view of one image, in the order in which it is applied."""
    top, left, height, width = view.box[row]
    parts = [f"{height:.0f}x{width:.0f} at {top:.0f},{left:.0f}" + (", flipped" if view.flip[row] else "")]
    if view.jitter[row]:
        factors = view.factors[row]
        parts.append(" ".join(f"{_OPERATIONS[op][:3]} {factors[op]:+.2f}" for op in view.order[row]))
    flags = ["grey"] * bool(view.grey[row]) + [f"blur {view.sigma[row]:.2f}"] * bool(view.sigma[row] > 0)
    flags += ["solarized"] * bool(view.solarize[row])
    return "\n".join([*parts, ", ".join(flags)]).strip()


def _grid(rows: int, columns: int) -> tuple[Any, NDArray[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 * columns, 1.9 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _show(axes: "Axes", picture: Picture) -> None:
    axes.imshow(picture)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_original(axes: "Axes", shards: "ShardSet", plan: "BatchPlan", row: int) -> None:
    from matplotlib.patches import Rectangle
    from PIL import Image

    from pipeline.reader import Reader

    sample = int(plan.ids[row])
    with Image.open(io.BytesIO(Reader(shards).read(sample).tobytes())) as image:
        _show(axes, np.asarray(image.convert("RGB")))
    for number, view in enumerate(plan.views):
        top, left, height, width = view.box[row]
        axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=f"C{number}", linewidth=1))
    label = int(shards.index.label[sample])
    names = shards.manifest.class_names
    axes.set_title(f"{sample}: {names[label] if 0 <= label < len(names) else label}"[:28], fontsize=6)


def _draw_difference(axes: "Axes", first: NDArray[Any], second: NDArray[Any]) -> None:
    difference = np.abs(first - second)
    _show(axes, np.minimum(255, 32 * difference).astype(np.uint8))
    axes.set_title("difference x 32", fontsize=6)
    axes.set_xlabel(f"mean {difference.mean():.3f}, largest {difference.max()}", fontsize=5)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline.preview", description="Draw images and their views.")
    parser.add_argument("--shards", type=Path, required=True, help="directory made by sharding.build")
    parser.add_argument("--out", type=Path, default=Path("views.png"), help="picture to write (default: views.png)")
    parser.add_argument("--views", default="simclr", help=f"{', '.join(PRESETS)}, or the YAML file of a run")
    parser.add_argument("--images", type=int, default=8, help="rows of the sheet (default: 8)")
    parser.add_argument("--step", type=int, default=0, help="step whose batch is shown (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order and the views (default: 0)")
    parser.add_argument("--backend", default="cpu", help="who makes the views (default: cpu)")
    parser.add_argument("--compare", nargs=2, metavar="BACKEND", help="two backends side by side, and their difference")
    return parser


if __name__ == "__main__":
    sys.exit(main())
