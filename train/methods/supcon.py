"""SupCon (Khosla et al., "Supervised contrastive learning", 2020): the contrastive baseline with labels.

``z = projector(encoder(view))``; a view's positives are all views of its class in the global batch (L_out, equation 2).

Settings are those of the authors' supcon_imagenet_resnet50.sh. Their loss is multiplied by the temperature of 0.1; here
the decay of 1e-3 is divided by it and what LARS does not adapt has a tenth of the rate, which is the same. Substituted:
SimCLR's views for AutoAugment's, which are not available; a hidden layer in the projector, but for the ImageNet recipe.
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
        "simclr",
        optim={"learning_rate": 0.4, "weight_decay": 0.01, "excluded_rate": 0.1, "epochs": 350, "warmup_epochs": 12},
        run={"dir": "runs/supcon", "global_batch_size": 6144},
    )
    takes_labels = True

    def loss(self, e: Embeddings, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        assert labels is not None
        keys, key_labels = self._world.gather(e.z, dim=1), self._world.gather(labels)
        offset = self._world.rank * len(labels)
        return Loss(sup_con(e.z, labels, keys, key_labels, offset, self._config.temperature), {})
