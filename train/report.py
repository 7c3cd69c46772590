"""Runs as one page that needs no network.

python -m train.report runs/mine runs/other --out report.html
python -m train.report runs/mine --watch
"""

import argparse
import io
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from pipeline.preview import draw_sheet
from sharding.command import Parser, UserError, command
from train.config import Config, validate
from train.engine.automatic import PROVENANCE
from train.engine.monitor import read_lines, settled
from train.evaluate.pictures import MAP, NEIGHBOURS, PICTURES, data_uri, draw_maps
from train.overrides import ConfigError, leaves, read_yaml

_SHEET, _MAP = (f"{PICTURES}/pretrained/{name}" for name in (NEIGHBOURS, MAP))
_PORT, _REFRESH_SECONDS = 6007, 30
_MOST = 5000  # points of a curve: a browser draws dozens of such figures at once
_COLORS = ("#3b82f6", "#f97316", "#10b981", "#ec4899", "#8b5cf6", "#ca8a04", "#06b6d4", "#ef4444")  # on white and black
Record = dict[str, Any]


@command("train.report")
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    runs = read_runs(options.runs)
    different = {f"{run.config.views} {run.config.data.shards}": run for run in reversed(runs) if run.config}
    sheet = partial(draw_views, num_images=options.images)
    views = [draw(run, sheet) for run in reversed(different.values())] if options.images else []
    if options.watch is None:
        out = options.out or options.runs[0] / "report.html"
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(render(runs, views))
        print(out)
        return 0
    with serve(lambda: render(read_runs(options.runs), views, _REFRESH_SECONDS), options.watch) as server:
        print(f"http://127.0.0.1:{server.server_port}/ shows the runs as they are; Ctrl-C ends it", flush=True)
        server.serve_forever()
    return 0


@dataclass(frozen=True)
class Run:
    """What a run left in its directory; ``config`` is None where today's models refuse the ``settings``."""

    name: str
    settings: Record
    config: Config | None
    records: list[Record]
    evaluations: list[Record]
    starts: list[Record]
    maps: list[Record]  # of the newest evaluation that drew one
    problems: list[str]
    study: Record  # `train.tune`'s of which it is a trial; empty if it is none
    path: Path

    def steady(self, name: str) -> list[float]:
        """A metric without intervals after a start, in which things warm up, if there are any others."""
        values = [r[name] for r in self.records[1:] if name in r and "resumed_at" not in r]
        return values or [r[name] for r in self.records if name in r]

    def thinned(self) -> list[Record]:
        """Every so many of the records, where there are more than a page can draw."""
        return self.records[:: math.ceil(len(self.records) / _MOST) or 1]


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """Raises `UserError` for a directory that is no run's; anything else that is wrong is told by ``Run.problems``."""
    paths = list(dict.fromkeys(path.resolve() for path in directories))
    names = [path.name for path in paths]
    return [_read(path, path.name if names.count(path.name) == 1 else str(path)) for path in paths]


def _read(path: Path, name: str) -> Run:
    if not any((path / file).exists() for file in ("config.yaml", "metrics.jsonl")):
        found = "found neither config.yaml nor metrics.jsonl; of a study name the trials"
        raise UserError(f"{path}: expected the directory of a run, {found}")
    settings, config, problems = {}, None, []
    try:
        settings = read_yaml(path / "config.yaml")
        config = validate(settings, str(path / "config.yaml"))
    except ConfigError as error:
        problems.append(str(error))
    files = {"metrics.jsonl": "step", "evaluation.jsonl": "results", PROVENANCE: "commit", _MAP: "thumbnail"}
    found, torn = zip(*(read_lines(path / file, key) for file, key in files.items()), strict=True)
    metrics, evaluations, starts, maps = found
    studies, torn_study = read_lines(path.parent / "study.json", "study")  # a single line
    told, problems = next(iter(studies), {}), sum(torn, problems) + torn_study
    return Run(name, settings, config, settled(metrics), evaluations, starts, maps, problems, told, path)


def differences(runs: Sequence[Run]) -> dict[str, list[str | None]]:
    """The settings that are not the same in all runs, None where a run has no such setting; but for ``run.dir``."""
    flat = [{name: str(value) for name, value in leaves(run.settings)} for run in runs]
    found = {name: [one.get(name) for one in flat] for one in flat for name in one if name != "run.dir"}
    return {name: values for name, values in found.items() if len(set(values)) > 1}


def evaluated(runs: Sequence[Run]) -> list[Record]:
    """A row a value, by ``found`` for each encoder; those of different runs stand beside each other."""
    rows: list[Record] = []
    order: dict[tuple[str, str], int] = {}
    for run in runs:
        for record in run.evaluations:
            results = record["results"]
            for key in dict.fromkeys((p, n) for ps in results.values() for p, values in ps.items() for n in values):
                found = {encoder: ps.get(key[0], {}).get(key[1]) for encoder, ps in results.items()}
                rows.append({"protocol": key[0], "name": key[1], "run": run.name, "record": record, "found": found})
                order.setdefault(key, len(order))
    return sorted(rows, key=lambda row: (row["protocol"], order[row["protocol"], row["name"]]))


def draw(run: Run, picture: Callable[[Run], Any]) -> Record:
    """An image as the page holds it, or why there is none."""
    try:
        return {"run": run.name, "picture": data_uri(picture(run))}
    except (UserError, OSError) as error:
        return {"run": run.name, "problem": str(error)}


def draw_views(run: Run, num_images: int) -> Image.Image:
    """A few images and their views."""
    assert run.config
    shards, cache_dir, seed = run.config.data.shards, run.config.data.cache_dir, run.config.run.seed
    options = {"images": num_images, "step": 0, "seed": seed, "backend": "cpu", "views": "views"}
    figure = draw_sheet(argparse.Namespace(shards=shards, cache_dir=cache_dir, **options), run.config.views)
    figure.savefig(file := io.BytesIO(), dpi=200)
    return Image.open(file)


def neighbours(runs: Sequence[Run]) -> list[Record]:
    """The sheets that evaluations have left."""
    return [draw(run, lambda run: Image.open(run.path / _SHEET)) for run in runs if (run.path / _SHEET).exists()]


def draw_figures(runs: Sequence[Run]) -> tuple[str, dict[str, str], list[Record]]:
    """The library and the data as scripts, and the elements that figures fill: by the name of a metric, and maps."""
    from bokeh.embed import components
    from bokeh.models import ColumnDataSource, DataRange1d
    from bokeh.resources import Resources

    names = dict.fromkeys(k for run in runs for r in run.records for k, v in r.items() if isinstance(v, int | float))
    columns = [{name: [r.get(name) for r in run.thinned()] for name in names} for run in runs]
    sources = [ColumnDataSource({k: np.array(v, np.float32) for k, v in column.items()}) for column in columns]
    steps, mapped = DataRange1d(), [run for run in runs if run.maps]
    figures = {name: _figure(runs, sources, name, steps) for name in names if name not in ("step", "resumed_at")}
    every = (figures, *(draw_maps(run.maps[-1]) for run in mapped))
    curves, *maps = (components(plots) if plots else ("", {}) for plots in every)
    scripts = [Resources(mode="inline", components=["bokeh"]).render(), *(script for script, _ in (curves, *maps))]
    elements = [{"run": run.name, "figures": found} for run, (_, found) in zip(mapped, maps, strict=True)]
    return "".join(scripts), curves[1], elements


def _figure(runs: Sequence[Run], sources: Sequence[Any], name: str, steps: Any) -> Any:
    """At first no tool takes what is dragged, so that a finger scrolls the page."""
    from bokeh.models import ColumnDataSource, HoverTool, Range1d, VSpan
    from bokeh.plotting import figure

    plot = figure(height=240, sizing_mode="stretch_width", tools="box_zoom,pan,reset,save", x_range=steps)
    plot.toolbar.active_drag, plot.toolbar.logo = None, None
    for run, source, color in zip(runs, sources, cycle(_COLORS), strict=False):
        plot.line("step", name, source=source, color=color, line_width=1.8, name=run.name)
        resumed = [record["resumed_at"] for record in run.records if "resumed_at" in record]
        plot.add_glyph(ColumnDataSource({"x": resumed}), VSpan(x="x", line_dash="dotted", line_color=color))
    plot.add_tools(HoverTool(tooltips=[("run", "$name"), ("step", "@step{0}"), ("value", f"@{{{name}}}{{0.0000}}")]))
    if name in ("images_per_second", "data_wait_percent"):  # intervals after a start may leave the picture
        plot.y_range = Range1d(start=0, end=1.1 * max(max(run.steady(name), default=0) for run in runs) or 1)
    return plot


def render(runs: Sequence[Run], views: Sequence[Record], refresh_seconds: int = 0) -> str:
    """The page. Whatever is read from a run is escaped."""
    try:
        from jinja2 import Environment

        script, figures, maps = draw_figures(runs)
    except ImportError as error:
        raise UserError(f"{error}; pip install 'parallax-ssl[report]'") from None
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {f.__name__: f for f in (statistics.median, differences, evaluated, neighbours)}
    environment.filters["yaml"] = lambda tree: yaml.safe_dump(tree, sort_keys=False)
    page = environment.from_string(Path(__file__).with_suffix(".html").read_text())
    made = {"now": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC", "refresh_seconds": refresh_seconds}
    return page.render(runs=runs, views=views, script=script, figures=figures, maps=maps, colors=_COLORS, **made)


def serve(page: Callable[[], str], port: int) -> HTTPServer:
    """A server, on the loopback device only, of the page as it is when it is asked for. Port 0: any that is free."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = page().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(body)

    try:
        return HTTPServer(("127.0.0.1", port), Answer)
    except OSError as error:
        raise UserError(f"--watch {port}: {error.strerror}; choose a different port") from None


def _parser() -> Parser:
    parser = Parser("python -m train.report", "Show runs, also unfinished ones, as one page that needs no network.")
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run; several are laid over each other")
    add("--out", type=Path, help="the page to write (default: report.html in the first run)")
    add("--images", type=int, default=4, help="images to show with their views (default: 4; 0: none)")
    watch = f"serve the page, on this machine only, while runs go on (default port: {_PORT}); nothing is written"
    add("--watch", nargs="?", type=int, const=_PORT, metavar="PORT", help=watch)
    return parser


if __name__ == "__main__":
    sys.exit(main())
