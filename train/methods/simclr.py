"""SimCLR (Chen et al., "A simple framework for contrastive learning of visual representations", 2020).

``z = projector(encoder(view))``; the loss is NT-Xent (equation 1) over all views of the global batch, or
one of those that were proposed in its place: DCL, DCLW, spectral contrastive, alignment + uniformity.

Kept: the three-layer projector with BatchNorm after each layer, BatchNorm over the global batch, LARS without decay and
adaptation of biases and BatchNorm, 10 epochs of warm-up, cosine. Substituted: the projector's last BatchNorm keeps its
bias (google-research/simclr has none); torch's initialisation of linear layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field

from train.losses.contrastive import align_uniform, dcl, dclw, nt_xent, spectral
from train.methods import Loss, Method, MethodConfig, Recipe, encode
from train.model.draws import Draws
from train.model.encoder import Encoder
from train.model.heads import mlp
from train.processes.distributed import World


class SimCLRConfig(MethodConfig):
    name: Literal["simclr"] = "simclr"
    loss: Literal["ntxent", "dcl", "dclw", "spectral", "align_uniform"] = Field(
        "ntxent", description="the loss; see train/losses/contrastive.py"
    )
    temperature: float = Field(0.1, gt=0, description="tau of equation 1, and of DCL and DCLW; the others have none")
    hidden: int = Field(2048, ge=1, description="width of the projector's hidden layers")
    out: int = Field(128, ge=1, description="dimensions of the embedding")
    layers: int = Field(3, ge=1, description="linear layers of the projector")


class Embeddings(NamedTuple):
    z: torch.Tensor  # (V, b, D)


class SimCLR(Method):
    Config = SimCLRConfig
    recipe = Recipe("simclr", {"run": {"dir": "runs/simclr"}})

    def __init__(self, config: SimCLRConfig, encoder: Encoder, world: World) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(encoder.num_features, config.hidden, config.out, config.layers)
        self._contrast, self._world = _loss(config), world

    def forward(self, views: list[torch.Tensor], draws: Draws) -> Embeddings:
        z = self.projector(encode(self.encoder, views))
        return Embeddings(z.view(len(views), len(views[0]), -1))

    def loss(self, e: Embeddings, labels: torch.Tensor | None = None) -> Loss:
        keys = self._world.gather(e.z, dim=1)
        value = self._contrast(e.z, keys, self._world.rank * e.z.shape[1])
        z = F.normalize(e.z.detach(), dim=-1)
        return Loss(value, {"alignment": (z[0] * z[1]).sum(-1).mean()})


Contrast = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def _loss(config: SimCLRConfig) -> Contrast:
    """Of anchors (V, b, D), all embeddings (V, B, D) and the place of the anchors among them."""
    tempered = {"ntxent": nt_xent, "dcl": dcl, "dclw": dclw}
    if config.loss in tempered:
        return partial(tempered[config.loss], temperature=config.temperature)
    untempered: dict[str, Contrast] = {"spectral": spectral, "align_uniform": align_uniform}
    return untempered[config.loss]
