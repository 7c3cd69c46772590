"""Barlow Twins (Zbontar et al., "Barlow Twins: self-supervised learning via redundancy reduction", 2021).

``z = projector(encoder(view))``; the cross-correlation matrix (D, D) of two views over the global batch is pulled to
the identity (equation 1): equal views, and dimensions that do not repeat one another. More than two views: the mean
over their pairs.

Substituted: LARS with the learning rate inside the momentum. Each process computes its share of the matrix's rows. The
gradient of facebookresearch/barlowtwins is 1/W of its loss's on W processes: the summed matrix passes it to a process's
own part only, and DDP averages. LARS undoes that for weights. Not for biases and BatchNorm, whose published 0.0048 x
B/256 is 0.0003 x B/256 of the loss here (W = 16 by their README), nor for the decay, whose 1e-6 is 1.6e-5.
"""

from itertools import combinations
from typing import ClassVar, Literal

import torch
from pydantic import Field

from train.losses.redundancy import barlow_twins
from train.methods import Loss, Recipe
from train.methods.networks import Embeddings, Projected, ProjectorConfig
from train.model.draws import Draws
from train.model.heads import Widths


class BarlowTwinsConfig(ProjectorConfig):
    name: Literal["barlow"] = "barlow"
    off_diagonal: float = Field(0.0051, ge=0, description="lambda of equation 1: weight of the redundancy term")
    scale: float = Field(1.0, gt=0, description="factor of the loss; solo-learn takes 0.1 on small data sets")
    hidden: Widths = Field(8192, description="width of the projector's hidden layers")
    out: int = Field(8192, ge=1, description="dimensions of the embedding")


class BarlowTwins(Projected):
    Config = BarlowTwinsConfig
    head: ClassVar = {"last_norm": False, "last_bias": False}
    recipe = Recipe(
        "byol",
        optim={"name": "lars", "learning_rate": 0.2, "final_learning_rate": 0.001, "excluded_rate": 0.0015}
        | {"weight_decay": 1.6e-5, "epochs": 1000, "warmup_epochs": 10},
        run={"dir": "runs/barlow", "global_batch_size": 2048},
    )

    def loss(self, e: Embeddings, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        z = self._world.gather(e.z, dim=1)
        rows = slice(self._world.rank, None, self._world.size)  # of the matrix: this process's share
        pairs = list(combinations(z, 2))
        total = torch.stack([barlow_twins(a, b, self._config.off_diagonal, rows) for a, b in pairs]).mean()
        value = self._config.scale * self._world.size * total  # whose mean over processes is the sum of their shares
        return Loss(value, {"correlation": self._correlation(z.detach())})

    @staticmethod
    def _correlation(z: torch.Tensor) -> torch.Tensor:
        """The mean of the matrix's diagonal for the first two views: 1 where they agree."""
        a, b = z[0] - z[0].mean(0), z[1] - z[1].mean(0)
        return ((a * b).mean(0) / (a.square().mean(0) * b.square().mean(0) + 1e-12).sqrt()).mean()
