"""Pictures that a protocol leaves beside the checkpoint, with thumbnails of the images in them."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.loader import Loader
from pipeline.order import Sequential
from pipeline.views import in_levels, preset
from sharding.manifest import ShardSet

PICTURES = "pictures"  # the folder for them, beside the checkpoints; one folder in it for each encoder
NEIGHBOURS, MAP = "neighbours.png", "map.json"  # what the report looks for
_FRAME, _MARGIN = 6, 4  # pixels around a tile of a sheet
_SAME = (0, 158, 115)  # the frame's green, which colour-blind readers tell from white
TITLES = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
_TOOLS = "box_zoom,pan,lasso_select,reset,save"
_TOOLTIP = '<img src="@thumbnail" width="96" height="96" style="image-rendering: auto"><div>@class, sample @id</div>'
Picture = NDArray[np.uint8]
Columns = dict[str, list[Any]]  # of a map: a row an image


@dataclass(frozen=True)
class Album:
    """Where the pictures of an encoder go, beside its checkpoint of ``step``, which were ``drawn``, and how `Loader`
    reads (``reading``) the images in them."""

    directory: Path
    encoder: str
    step: int | None
    shards: ShardSet
    reading: dict[str, Any]
    drawn: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.directory / PICTURES / self.encoder

    def file(self, name: str) -> Path:
        """Where to write it; makes the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.drawn.append(name)
        return self.folder / name

    def thumbnails(self, ids: torch.Tensor, size: int) -> Picture:
        """(n, size, size, 3): the middle square of each sample of ``ids`` (n,), which may repeat; black where it cannot
        be decoded."""
        unique, where = np.unique(ids.numpy(), return_inverse=True)
        views = in_levels(preset("eval", size=size, resize=size))
        tiles = np.zeros((len(unique), size, size, 3), np.uint8)
        with Loader(self.shards, views, seed=0, order=Sequential(unique, 256), **self.reading) as loader:
            for batch in loader:
                place = np.searchsorted(unique, batch.ids.cpu().numpy())
                tiles[place] = batch.views[0].permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)
        return tiles[where]

    def classes(self, labels: torch.Tensor) -> list[str]:
        """Their names; "" where there is no label."""
        names = self.shards.manifest.class_names
        return [names[label] if 0 <= label < len(names) else "" for label in labels.tolist()]


def data_uri(image: Image.Image) -> str:
    """The image as an address that holds it, in WebP."""
    image.save(file := io.BytesIO(), "webp", quality=75)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def save_sheet(path: Path, tiles: Picture, framed: NDArray[np.bool_], rows: Sequence[str]) -> None:
    """A PNG of ``tiles`` (R, C, S, S, 3): rows with their names, the query and its neighbours by number; a frame around
    those that are ``framed`` (R, C)."""
    from matplotlib.figure import Figure

    num_rows, num_columns, size = tiles.shape[:3]
    edge, cell = _MARGIN + _FRAME, size + 2 * (_MARGIN + _FRAME)
    canvas = np.full((num_rows, num_columns, cell, cell, 3), 255, np.uint8)
    canvas[:, :, _MARGIN:-_MARGIN, _MARGIN:-_MARGIN][framed] = _SAME
    canvas[:, :, edge:-edge, edge:-edge] = tiles
    figure = Figure(figsize=(1 + 0.7 * num_columns, 0.3 + 0.7 * num_rows), layout="constrained")
    axes = figure.subplots()
    axes.imshow(canvas.swapaxes(1, 2).reshape(num_rows * cell, num_columns * cell, 3))
    axes.set_xticks(cell * (np.arange(num_columns) + 0.5), ["query", *map(str, range(1, num_columns))])
    axes.set_yticks(cell * (np.arange(num_rows) + 0.5), [name[:20] for name in rows])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=7)
    axes.set_frame_on(False)
    figure.savefig(path, dpi=160)


def draw_maps(columns: Columns) -> dict[str, Any]:
    """Bokeh's figures by method, with a thumbnail on hover; what is selected in one is selected in all."""
    from bokeh.models import ColumnDataSource
    from bokeh.plotting import figure

    source, plots = ColumnDataSource(columns), {}
    look: dict[str, Any] = {"tools": _TOOLS, "tooltips": _TOOLTIP, "sizing_mode": "scale_width", "max_width": 700}
    for name in (name for name in TITLES if f"{name} x" in columns):
        plot = figure(title=TITLES[name], match_aspect=True, **look)
        plot.scatter(f"{name} x", f"{name} y", source=source, color="color", size=6, alpha=0.7, nonselection_alpha=0.1)
        plot.toolbar.active_drag, plot.toolbar.logo = None, None
        plot.axis.visible = plot.grid.visible = False
        plots[name] = plot
    return plots
