"""SimCLR (Chen et al., "A simple framework for contrastive learning of visual representations", 2020).

``z = projector(encoder(view))``; the loss is NT-Xent (equation 1) over all views of the global batch, or
one of those that were proposed in its place: DCL, DCLW, spectral contrastive, alignment + uniformity.

Substituted: the projector's last BatchNorm keeps its bias (google-research/simclr has none); torch's initialisation of
linear layers. The loss is the paper's mean; their code's is twice that, which LARS sees for biases and BatchNorm.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from pydantic import Field

from train.losses.contrastive import align_uniform, dcl, dclw, nt_xent, spectral
from train.methods import Loss, Recipe
from train.methods.networks import Embeddings, Projected, ProjectorConfig
from train.model.draws import Draws
from train.model.encoder import Encoder
from train.model.heads import Norm
from train.processes.distributed import World

_TEMPERED = {"ntxent": nt_xent, "dcl": dcl, "dclw": dclw}
_OTHERS: dict[str, Callable[..., torch.Tensor]] = {"spectral": spectral, "align_uniform": align_uniform}


class SimCLRConfig(ProjectorConfig):
    name: Literal["simclr"] = "simclr"
    loss: Literal["ntxent", "dcl", "dclw", "spectral", "align_uniform"] = Field(
        "ntxent", description="the loss; see train/losses/contrastive.py"
    )
    layers: int = Field(2, ge=1, description="linear layers of the projector; google-research/simclr has 3")
    temperature: float = Field(0.1, gt=0, description="tau of equation 1, and of DCL and DCLW; the others have none")
    norm: Norm = Field("batch", description="after each layer of the projector: batch, layer or none; VISSL has none")


class SimCLR(Projected):
    Config = SimCLRConfig
    recipe = Recipe("simclr", run={"dir": "runs/simclr"})

    def __init__(self, config: SimCLRConfig, encoder: Encoder, world: World) -> None:
        super().__init__(config, encoder, world, norm=config.norm)
        tempered = _TEMPERED.get(config.loss)
        self._contrast = partial(tempered, temperature=config.temperature) if tempered else _OTHERS[config.loss]

    def loss(self, e: Embeddings, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        keys = self._world.gather(e.z, dim=1)
        return Loss(self._contrast(e.z, keys, self._world.rank * e.z.shape[1]), {})
