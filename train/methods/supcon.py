"""SupCon (Khosla et al., "Supervised contrastive learning", 2020): the contrastive baseline with labels.

``z = projector(encoder(view))``; a view's positives are all views of its class in the global batch (L_out, equation 2).

Kept: temperature 0.1, a projector of two layers without BatchNorm (2048 hidden, 128), a batch of 6144, 350 epochs (half
of the paper's longest, which costs it less than half a point), LARS. Substituted: SimCLR's views (the paper's best are
AutoAugment's, which are not available); SimCLR's learning rate, decay and warm-up, since the paper gives none; the loss
is not multiplied by a ratio of temperatures as in the authors' code, which LARS would not see.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field

from train.losses.contrastive import sup_con
from train.methods import Loss, Method, MethodConfig, Recipe, encode
from train.model.draws import Draws
from train.model.encoder import Encoder
from train.model.heads import mlp
from train.processes.distributed import World


class SupConConfig(MethodConfig):
    name: Literal["supcon"] = "supcon"
    temperature: float = Field(0.1, gt=0, description="tau of equation 2")
    hidden: int = Field(2048, ge=1, description="width of the projector's hidden layers")
    out: int = Field(128, ge=1, description="dimensions of the embedding")
    layers: int = Field(2, ge=1, description="linear layers of the projector")


class Embeddings(NamedTuple):
    z: torch.Tensor  # (V, b, D), at least two views: each image has a positive


class SupCon(Method):
    Config = SupConConfig
    recipe = Recipe(
        "simclr", {"optim": {"name": "lars", "epochs": 350}, "run": {"dir": "runs/supcon", "global_batch_size": 6144}}
    )
    takes_labels = True

    def __init__(self, config: SupConConfig, encoder: Encoder, world: World) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(encoder.num_features, config.hidden, config.out, config.layers, norm="none")
        self._temperature, self._world = config.temperature, world

    def forward(self, views: list[torch.Tensor], draws: Draws) -> Embeddings:
        z = self.projector(encode(self.encoder, views))
        return Embeddings(z.view(len(views), len(views[0]), -1))

    def loss(self, e: Embeddings, labels: torch.Tensor | None = None) -> Loss:
        assert labels is not None
        keys, key_labels = self._world.gather(e.z, dim=1), self._world.gather(labels)
        value = sup_con(e.z, labels, keys, key_labels, self._world.rank * len(labels), self._temperature)
        z = F.normalize(e.z.detach(), dim=-1)
        return Loss(value, {"alignment": (z[0] * z[1]).sum(-1).mean()})
