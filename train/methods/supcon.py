"""SupCon (Khosla et al., "Supervised contrastive learning", 2020): the contrastive baseline with labels.

``z = projector(encoder(view))``; a view's positives are all views of its class in the global batch (L_out, equation 2).

Kept (section 4.5): temperature 0.1, batches of 6144, 350 epochs (a ResNet-200's: 700), LARS with a cosine. Substituted:
SimCLR's views (the paper's best are AutoAugment's, which are not available); SimCLR's learning rate, decay and warm-up,
since the paper gives none; the loss is not multiplied by the temperature as in the paper, which LARS would not see.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from train.losses.contrastive import sup_con
from train.methods import Loss, Recipe
from train.methods.networks import Embeddings, Projected, ProjectorConfig
from train.model.draws import Draws


class SupConConfig(ProjectorConfig):
    name: Literal["supcon"] = "supcon"
    temperature: float = Field(0.1, gt=0, description="tau of equation 2")
    layers: int = Field(2, ge=1, description="linear layers of the projector")


class SupCon(Projected):
    Config = SupConConfig
    head: ClassVar = {"norm": "none"}
    recipe = Recipe(
        "simclr", optim={"name": "lars", "epochs": 350}, run={"dir": "runs/supcon", "global_batch_size": 6144}
    )
    takes_labels = True

    def loss(self, e: Embeddings, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        assert labels is not None
        keys, key_labels = self._world.gather(e.z, dim=1), self._world.gather(labels)
        offset = self._world.rank * len(labels)
        return Loss(sup_con(e.z, labels, keys, key_labels, offset, self._config.temperature), {})
