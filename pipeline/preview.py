"""A contact sheet of images and their views, as a backend makes them.

python -m pipeline.preview --shards /data/shards --out views.png
python -m pipeline.preview --shards s3://bucket/shards --cache-dir /scratch/shards --views runs/simclr/config.yaml
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.loader import Loader
from pipeline.order import Sequential, Shuffled, lane_shard_sizes
from pipeline.plan import BatchPlan, ViewPlan
from pipeline.reading.cache import CacheOptions
from pipeline.reading.reader import Reader
from pipeline.views import PRESETS, ViewSpec, in_levels, parse, preset
from sharding.command import Parser, UserError, command
from sharding.manifest import ShardSet, open_shards
from sharding.planes import open_image

if TYPE_CHECKING:  # Matplotlib takes its time to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Picture = NDArray[np.uint8]

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
    """`draw_plan` of the first images of a step. Those that cannot be decoded are left out, and named in the log."""
    shards = open_shards(options.shards)
    cache = CacheOptions(options.cache_dir, _CACHE_BYTES, _CACHE_BYTES) if options.cache_dir else None
    with closing(Reader(shards, cache)) as reader:
        plan, views = make_views(shards, specs, cache, options)
        title = f"{options.views}, step {options.step}, seed {options.seed}"
        return draw_plan(reader, plan, views, title, options.backend)


def draw_plan(reader: Reader, plan: BatchPlan, views: Sequence[Picture], title: str, backend: str) -> "Figure":
    """One row an image: the original with its crops, then each view (n, size, size, 3) in the colour of its crop and
    what was drawn for it."""
    from matplotlib.figure import Figure

    rows, columns = len(plan), 1 + len(views)
    figure = Figure(figsize=(1.7 * columns, 2.0 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle(title, fontsize=7)
    for row, (first, *cells) in enumerate(grid):
        _draw_original(first, reader, plan, row)
        for number, (axes, view) in enumerate(zip(cells, plan.views, strict=True)):
            _show(axes, views[number][row], f"C{number}")
            axes.set_title(f"view {number}, {view.spec.size} px, {backend}", fontsize=6)
            axes.set_xlabel(describe(view, row), fontsize=5)
    return figure


def make_views(
    shards: ShardSet, specs: tuple[ViewSpec, ...], cache: CacheOptions | None, options: argparse.Namespace
) -> tuple[BatchPlan, list[Picture]]:
    """The first views of ``--images`` samples of a step's batch, a picture array (n, size, size, 3) per view."""
    order = Sequential(choose_samples(shards, options), options.images)
    on_gpu = options.backend == "dali" and torch.cuda.is_available()
    with Loader(
        shards,
        in_levels(specs),
        seed=options.seed,
        order=order,
        backend=options.backend,
        prefetch=1,
        cache=cache,
        device=torch.device("cuda" if on_gpu else "cpu"),
    ) as loader:
        batch = next(loader)
        return loader.plan(0), [view.permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8) for view in batch.views]


def choose_samples(shards: ShardSet, options: argparse.Namespace) -> NDArray[np.int64]:
    """Evenly spaced over a batch hardly larger than that, so that all lanes show."""
    if not 1 <= options.images <= _MAX_IMAGES:
        raise UserError(f"--images: expected 1 to {_MAX_IMAGES}, found {options.images}")
    if options.step < 0:
        raise UserError(f"--step: expected at least 0, found {options.step}")
    lanes = shards.manifest.num_lanes
    batch_size = -(-options.images // lanes) * lanes
    ids, _ = Shuffled(lane_shard_sizes(shards), options.seed, batch_size).batch(options.step)
    return ids[np.linspace(0, batch_size - 1, options.images).round().astype(int)]


def describe(view: ViewPlan, row: int) -> str:
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


def _show(axes: "Axes", picture: Picture, color: str = "white") -> None:
    axes.imshow(picture)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color=color, linewidth=1.5)


def _draw_original(axes: "Axes", reader: Reader, plan: BatchPlan, row: int) -> None:
    from matplotlib.patches import Rectangle

    sample = int(plan.ids[row])
    _show(axes, np.asarray(open_image(reader.read(sample).tobytes())))
    for number, view in enumerate(plan.views):
        top, left, height, width = view.box[row]
        axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=f"C{number}", linewidth=1.5))
    label = int(reader.shards.index.label[sample])
    names = reader.shards.manifest.class_names
    axes.set_title(f"{sample}: {names[label] if 0 <= label < len(names) else label}"[:28], fontsize=6)


def _parser() -> Parser:
    parser = Parser("python -m pipeline.preview", "Draw images and their views.")
    parser.add_argument("--shards", required=True, help="directory or URL made by sharding.build")
    parser.add_argument("--out", type=Path, default=Path("views.png"), help="picture to write (default: views.png)")
    parser.add_argument(
        "--views", default="simclr", help=f"{', '.join(PRESETS)}, or a YAML file with a section `views`"
    )
    parser.add_argument("--images", type=int, default=8, help="rows of the sheet (default: 8)")
    parser.add_argument("--step", type=int, default=0, help="step whose images are shown (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order and the views (default: 0)")
    parser.add_argument("--backend", default="cpu", help="who makes the views (default: cpu)")
    parser.add_argument("--cache-dir", type=Path, help="where to keep shards that lie behind a URL")
    return parser


if __name__ == "__main__":
    sys.exit(main())
