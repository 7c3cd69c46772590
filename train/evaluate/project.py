"""Maps of the test images: their representations, at unit length, in two dimensions by PCA, t-SNE (van der Maaten and
Hinton, "Visualizing data using t-SNE", 2008) and UMAP (McInnes et al., 2018)."""

import json
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE, trustworthiness
from sklearn.preprocessing import normalize
from threadpoolctl import threadpool_limits
from torch.utils.tensorboard import SummaryWriter

from sharding.command import UserError
from train.evaluate import Protocol, one_too
from train.evaluate.features import Features
from train.evaluate.pictures import MAP, TITLES, Album, Columns, Picture, data_uri, draw_maps

_COMPONENTS = 50  # that t-SNE and UMAP start from, as van der Maaten and Hinton do with 30


class Project(Protocol):
    needs_labels: ClassVar[bool] = False

    methods: Annotated[tuple[Literal["pca", "tsne", "umap"], ...], one_too, Field(min_length=1)] = ("pca", "tsne")
    points: int = Field(2000, ge=12, le=20_000, description="images drawn; where there are more, chosen by the seed")
    perplexity: float = Field(30.0, ge=1, description="of t-SNE: about the number of neighbours that an image has")
    neighbours: int = Field(15, ge=2, description="of UMAP")
    seed: int = Field(0, ge=0, lt=2**32, description="of the choice of images, t-SNE and UMAP")

    def check(self, num_train: int, num_test: int) -> None:
        count = min(self.points, num_test)
        least_of = {"tsne": ("perplexity", self.perplexity), "umap": ("neighbours", self.neighbours)}
        for name, least in (("points", 11), *(least_of[method] for method in self.methods if method in least_of)):
            if least >= count:
                raise UserError(f"project.{name}: expected more than {least:g} test images to draw, found {count}")
        for package, extra, needed in (("bokeh", "report", True), ("umap", "umap", "umap" in self.methods)):
            if needed and not find_spec(package):
                raise UserError(f"project: {package} is not installed; pip install 'parallax-ssl[{extra}]'")

    def draw(self, test: Features, album: Album, device: torch.device) -> dict[str, float]:
        """``map.png``, ``map.html`` and ``map.json`` in the album, and TensorBoard's projector. The values are the
        trustworthiness of each map (Venna and Kaski, 2001): 1 if all neighbours in it are neighbours indeed."""
        from bokeh.embed import file_html
        from bokeh.resources import INLINE

        self.check(0, len(test))  # undecodable ones are left out by now
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(self.seed))
        part = test.take(order[: self.points].sort().values)
        components, maps = self.maps(part)
        tiles, classes = album.thumbnails(part.ids, 48), album.classes(part.labels)
        columns: Columns = {"id": part.ids.tolist(), "class": classes, "color": _colors(part.labels.numpy())}
        columns["thumbnail"] = [data_uri(Image.fromarray(tile)) for tile in tiles]
        for name, at in maps.items():
            columns |= {f"{name} {axis}": [float(f"{p:.4g}") for p in at[:, i]] for i, axis in enumerate("xy")}
        album.file(MAP).write_text(json.dumps(columns))
        plots = draw_maps(columns)
        album.file("map.html").write_text(file_html(list(plots.values()), INLINE, f"{album.shards.directory}: a map"))
        _figure(columns, list(plots)).savefig(album.file("map.png"), dpi=300)
        _project(components, columns, tiles, album)
        return {f"{name} trustworthiness": float(trustworthiness(components, at)) for name, at in maps.items()}

    def maps(self, part: Features) -> tuple[NDArray, dict[str, NDArray]]:
        """Principal components (n, 50 or less), and points (n, 2) by method. Equal to the bit on a machine: with more
        threads than one sums are rounded in an order of their own, which t-SNE magnifies to a different picture."""
        ((h, _),) = part.tiles(torch.device("cpu"), len(part))
        with threadpool_limits(1):
            pca = PCA(min(_COMPONENTS, *h.shape), svd_solver="covariance_eigh")
            components = pca.fit_transform(normalize(h.double().numpy()))
            return components, {name: self._map(name, components) for name in dict.fromkeys(self.methods)}

    def _map(self, name: str, components: NDArray) -> NDArray:
        if name == "pca":
            return components[:, :2]
        if name == "tsne":
            return TSNE(2, init="pca", perplexity=self.perplexity, random_state=self.seed).fit_transform(components)
        from umap import UMAP

        return UMAP(n_neighbors=self.neighbours, random_state=self.seed, n_jobs=1).fit_transform(components)


def _figure(columns: Columns, names: Sequence[str]) -> Figure:
    """The maps beside each other, without numbers, which mean nothing; with a legend of up to 20 classes."""
    figure = Figure(figsize=(3.2 * len(names), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axes.scatter(columns[f"{name} x"], columns[f"{name} y"], s=4, c=columns["color"], linewidths=0, alpha=0.8)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set(title=TITLES[name], xticks=[], yticks=[])
    legend = dict(sorted(zip(columns["class"], columns["color"], strict=True)))
    if 1 < len(legend) <= 20:
        marks = [Line2D([], [], marker="o", linestyle="", markersize=4, color=color) for color in legend.values()]
        style = {"ncols": min(len(legend), 3 * len(names)), "fontsize": 7, "frameon": False}
        figure.legend(marks, list(legend), loc="outside lower center", **style)
    return figure


def _colors(labels: NDArray) -> list[str]:
    """One for each class, as different as their number allows."""
    present, position = np.unique(labels, return_inverse=True)
    scale = colormaps["tab10" if len(present) <= 10 else "turbo"].resampled(len(present))
    return [to_hex(scale(int(p))) for p in position]


def _project(components: NDArray, columns: Columns, tiles: Picture, album: Album) -> None:
    """For TensorBoard's projector, in place of an earlier evaluation's."""
    shutil.rmtree(folder := album.directory / "tensorboard" / f"map-{album.encoder}", ignore_errors=True)
    with SummaryWriter(str(folder)) as board:
        images = torch.from_numpy(tiles).permute(0, 3, 1, 2) / 255
        about = [list(pair) for pair in zip(columns["class"], columns["id"], strict=True)]
        board.add_embedding(components, about, images, album.step or 0, "representations", ["class", "sample"])
