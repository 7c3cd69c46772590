"""VICReg (Bardes, Ponce & LeCun, "VICReg: variance-invariance-covariance regularization", 2022).

``z = projector(encoder(view))``, the projector being the paper's expander. Equation 6 with the terms

    invariance   mean over pairs of views, images and dimensions of (z - z')^2
    variance     the hinge max(0, 1 - std) of dimensions over the global batch, averaged over views
    covariance   squared covariances of different dimensions / D, averaged over views, times 2

Where the paper and the authors' code differ, it is the code, as their weights are the code's: the invariance is divided
by D, the variance averaged and the covariance summed over the two views. Substituted: hidden layers without bias, which
BatchNorm makes void; LARS with the learning rate inside the momentum. Each process computes its share of the matrix's
rows.
"""

from itertools import combinations
from typing import ClassVar, Literal

import torch
from pydantic import Field

from train.losses.redundancy import covariance, variance_hinge
from train.methods import Loss, Recipe
from train.methods.networks import Embeddings, Projected, ProjectorConfig
from train.model.draws import Draws
from train.model.heads import Widths


class VICRegConfig(ProjectorConfig):
    name: Literal["vicreg"] = "vicreg"
    invariance: float = Field(25.0, ge=0, description="lambda: weight of the distance between views")
    variance: float = Field(25.0, ge=0, description="mu: weight of the standard deviations' hinge")
    covariance: float = Field(1.0, ge=0, description="nu: weight of the covariances")
    hidden: Widths = Field(8192, description="width of the expander's hidden layers")
    out: int = Field(8192, ge=1, description="dimensions of the embedding")


class VICReg(Projected):
    Config = VICRegConfig
    head: ClassVar = {"last_norm": False, "last_bias": False}
    length_counts = True
    recipe = Recipe(
        "vicreg",
        optim={"name": "lars", "learning_rate": 0.2, "final_learning_rate": 0.001, "weight_decay": 1e-6}
        | {"epochs": 1000, "warmup_epochs": 10},
        run={"dir": "runs/vicreg", "global_batch_size": 2048},
    )

    def loss(self, e: Embeddings, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        invariance = torch.stack([(a - b).square().mean() for a, b in combinations(e.z, 2)]).mean()
        z = self._world.gather(e.z, dim=1)
        variance = torch.stack([variance_hinge(view) for view in z]).mean()
        rows = slice(self._world.rank, None, self._world.size)  # of the covariance matrix: this process's share
        share = torch.stack([covariance(view, rows) for view in z]).mean()
        terms = {"invariance": invariance, "variance": variance, "covariance": 2 * self._world.size * share}
        value = sum(getattr(self._config, name) * term for name, term in terms.items())
        return Loss(torch.as_tensor(value), {name: term.detach() for name, term in terms.items()})
