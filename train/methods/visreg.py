"""VISReg (Wu, Balestriero & Levine, "VISReg: variance-invariance-sketching regularization for JEPA training", 2026).

``z = projector(encoder(view))`` for V views, of which the first ones of one size are global.

    loss = (1 - lambda) prediction + lambda (scale + shape + centre)
    prediction = mean over views, images and dimensions of (z - m)^2, m being the mean of an image's global views

The three regularisers (`train.losses.distribution`) are taken for each view over the global batch. K slices are drawn
each step; every process sorts the whole batch along its own K / W of them, so that together they do what one process
would (HaiyuWu/visreg draws K more with every process).

The rate of 9e-4 is for a batch of 128: 16 images a GPU (configs/default.yaml) on 8 of them (README). Drop path is in
configs/imagenet-visreg.yaml, as only ViTs have it. Substituted: 1e-4 is added to the standard deviation in the shape
term alone (theirs: 1e-6, in the scale term too).
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from train.losses.distribution import centre, scale, shape, unit_slices
from train.methods import Loss, Recipe
from train.methods.networks import Centred, Predicted, ProjectorConfig
from train.model.draws import Draws


class VISRegConfig(ProjectorConfig):
    min_global: ClassVar[int] = 1
    name: Literal["visreg"] = "visreg"
    regularizer: float = Field(0.9, ge=0, le=1, description="lambda: weight of the regularisers; 0.6 on small data")
    scale: float = Field(1.0, ge=0, description="weight of the standard deviations' term")
    shape: float = Field(1.0, ge=0, description="weight of the sliced Wasserstein distance")
    centre: float = Field(1.0, ge=0, description="weight of the means' term")
    slices: int = Field(4096, ge=1, description="random directions of a step, over all processes")
    out: int = Field(256, ge=1, description="dimensions of the embedding")


class VISReg(Predicted):
    Config = VISRegConfig
    head: ClassVar = {"last_norm": False, "activation": nn.GELU}
    recipe = Recipe(
        "visreg",
        optim={"name": "adamw", "learning_rate": 1.8e-3, "final_learning_rate": 0.001, "weight_decay": 5e-2}
        | {"epochs": 100, "warmup_epochs": 5, "clip_norm": 1.0},
        run={"dir": "runs/visreg", "global_batch_size": 128},
    )

    def loss(self, e: Centred, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        assert draws is not None
        prediction = (e.z - e.centre).square().mean()
        z = self._world.gather(e.z, dim=1)
        terms = {"scale": scale(z), "shape": self._shape(z, draws), "centre": centre(z)}
        regularizer = sum(getattr(self._config, name) * term for name, term in terms.items())
        value = (1 - self._config.regularizer) * prediction + self._config.regularizer * regularizer
        return Loss(value, {name: term.detach() for name, term in {"prediction": prediction, **terms}.items()})

    def _shape(self, z: torch.Tensor, draws: Draws) -> torch.Tensor:
        """This process's share, whose mean over processes is the mean over all slices."""
        slices = unit_slices(draws.shared_normal("slices", z.shape[-1], self._config.slices).to(z))
        own = slices[:, self._world.rank :: self._world.size]
        return shape(z, own).sum() * self._world.size / self._config.slices
