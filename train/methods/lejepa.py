"""LeJEPA (Balestriero & LeCun, "LeJEPA: provable and scalable self-supervised learning without the heuristics", 2025).

``z = projector(encoder(view))`` for V views, of which the first ones of one size are global.

    loss = (1 - lambda) invariance + lambda SIGReg
    invariance = mean over views, images and dimensions of (z - c)^2, c being the mean of an image's global views
    SIGReg = mean over views and K slices of the distance of z's distribution to N(0, I), times the number of images

The slices are new each step and the same on all processes, which average their characteristic functions, with gradient:
the regulariser is that of the global batch and costs each process its own images' share.

Kept: lambda 0.05, 1024 slices, 17 points on [0, 3], the projector 2048-2048-64, 2 + 6 views, AdamW at 5e-4 for a batch
of 512, decay 5e-4 (a ResNet's; a ViT's is 5e-2), cosine to 0.001 of the peak, 1 epoch of warm-up (MINIMAL.md). The
paper's ImageNet runs took a ViT-L/14 with drop path 0.1; nobody has published a configuration that reproduces them.
Substituted: hidden layers without bias, which BatchNorm makes void.
"""

from typing import Literal, NamedTuple

import torch
from pydantic import Field

from train.losses.distribution import characteristic, sigreg, unit_slices
from train.methods import Loss, Method, MethodConfig, Recipe, encode, same_size
from train.model.draws import Draws
from train.model.encoder import Encoder
from train.model.heads import mlp
from train.processes.distributed import World


class LeJEPAConfig(MethodConfig):
    name: Literal["lejepa"] = "lejepa"
    regularizer: float = Field(0.05, ge=0, le=1, description="lambda: weight of SIGReg against the invariance")
    slices: int = Field(1024, ge=1, description="random directions of a step")
    hidden: int = Field(2048, ge=1, description="width of the projector's hidden layers")
    out: int = Field(64, ge=1, description="dimensions of the embedding")
    layers: int = Field(3, ge=1, description="linear layers of the projector")


class Embeddings(NamedTuple):
    z: torch.Tensor  # (V, b, D)
    centre: torch.Tensor  # (1, b, D): the mean over global views


class LeJEPA(Method):
    Config = LeJEPAConfig
    recipe = Recipe(
        "lejepa",
        {
            "optim": {
                "name": "adamw",
                "learning_rate": 2.5e-4,
                "final_learning_rate": 0.001,
                "exclude": [],
                "weight_decay": 5e-4,
                "epochs": 100,
                "warmup_epochs": 1,
            },
            "run": {"dir": "runs/lejepa", "global_batch_size": 512},
        },
    )

    def __init__(self, config: LeJEPAConfig, encoder: Encoder, world: World) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(encoder.num_features, config.hidden, config.out, config.layers, last_norm=False)
        self._config, self._world = config, world

    def forward(self, views: list[torch.Tensor], draws: Draws) -> Embeddings:
        self._draws = draws
        z = self.projector(encode(self.encoder, views)).view(len(views), len(views[0]), -1)
        return Embeddings(z, z[: len(same_size(views)[0])].mean(0, keepdim=True))

    def loss(self, e: Embeddings, labels: torch.Tensor | None = None) -> Loss:
        invariance = (e.z - e.centre).square().mean()
        normal = self._draws.shared_normal("slices", e.z.shape[-1], self._config.slices)
        own = characteristic(e.z, unit_slices(normal.to(e.z)))
        empirical = self._world.gather(own[None]).mean(0)
        regularizer = sigreg(empirical, e.z.shape[1] * self._world.size)
        value = self._config.regularizer * regularizer + (1 - self._config.regularizer) * invariance
        return Loss(value, {"invariance": invariance.detach(), "sigreg": regularizer.detach()})
