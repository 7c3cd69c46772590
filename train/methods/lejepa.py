"""LeJEPA (Balestriero & LeCun, "LeJEPA: provable and scalable self-supervised learning without the heuristics", 2025).

``z = projector(encoder(view))`` for V views, of which the first ones of one size are global.

    loss = (1 - lambda) invariance + lambda SIGReg
    invariance = mean over views, images and dimensions of (z - c)^2, c being the mean of an image's global views
    SIGReg = mean over views and K slices of the distance of z's distribution to N(0, I), times the number of images

The slices are new each step and the same on all processes, which average their characteristic functions, with gradient:
the regulariser is that of the global batch and costs each process its own images' share.

Substituted: hidden layers without bias, which BatchNorm makes void.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from train.losses.distribution import characteristic, sigreg, unit_slices
from train.methods import Loss, Recipe
from train.methods.networks import Centred, Predicted, ProjectorConfig
from train.model.draws import Draws


class LeJEPAConfig(ProjectorConfig):
    min_global: ClassVar[int] = 1
    name: Literal["lejepa"] = "lejepa"
    regularizer: float = Field(0.05, ge=0, le=1, description="lambda: weight of SIGReg against the invariance")
    slices: int = Field(1024, ge=1, description="random directions of a step")
    out: int = Field(64, ge=1, description="dimensions of the embedding")


class LeJEPA(Predicted):
    Config = LeJEPAConfig
    head: ClassVar = {"last_norm": False}
    recipe = Recipe(
        "lejepa",
        optim={"name": "adamw", "learning_rate": 2.5e-4, "final_learning_rate": 0.001, "weight_decay": 5e-4}
        | {"exclude": [], "epochs": 100, "warmup_epochs": 1},
        run={"dir": "runs/lejepa", "global_batch_size": 512},
    )

    def loss(self, e: Centred, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        assert draws is not None
        invariance = (e.z - e.centre).square().mean()
        normal = draws.shared_normal("slices", e.z.shape[-1], self._config.slices)
        own = characteristic(e.z, unit_slices(normal.to(e.z)))
        empirical = self._world.gather(own[None]).mean(0)
        regularizer = sigreg(empirical, e.z.shape[1] * self._world.size)
        value = self._config.regularizer * regularizer + (1 - self._config.regularizer) * invariance
        return Loss(value, {"invariance": invariance.detach(), "sigreg": regularizer.detach()})
