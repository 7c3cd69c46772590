"""SimSiam (Chen & He, "Exploring simple Siamese representation learning", 2020).

``z = projector(encoder(view))``, ``p = predictor(z)``; each view's prediction is compared with the other views' z,
which count as constants (equations 3 and 4, algorithm 1).

Substituted: the predictor's learning rate moves as all do (table 1: 67.7 %; the paper's constant one: 68.1 %); the
linear layer before the last BatchNorm has no bias (the paper's is not trained). Beyond the paper: more than two views,
the mean over all ordered pairs.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from train.methods import Loss, Recipe
from train.methods.networks import Predictions, PredictorConfig, WithPredictor
from train.model.draws import Draws
from train.model.encoder import Encoder
from train.processes.distributed import World


class SimSiamConfig(PredictorConfig):
    name: Literal["simsiam"] = "simsiam"
    out: int = Field(2048, ge=1, description="dimensions of the embedding")


class SimSiam(WithPredictor):
    Config = SimSiamConfig
    recipe = Recipe(
        "mocov2",
        optim={"name": "sgd", "learning_rate": 0.05, "weight_decay": 1e-4, "exclude": []}
        | {"epochs": 100, "warmup_epochs": 0},
        run={"dir": "runs/simsiam", "global_batch_size": 512},
    )
    images_meet = False

    def __init__(self, config: SimSiamConfig, encoder: Encoder, world: World) -> None:
        super().__init__(config, encoder, world)
        self.projector[-1] = nn.BatchNorm1d(config.out, affine=False)

    def loss(self, e: Predictions, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        return Loss(negative_cosine(e.p, e.z.detach()), {})


def negative_cosine(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Minus the cosine of predictions ``p`` (V, b, D) with the embeddings ``z`` (V, b, D) of the image's other views:
    the mean over images and ordered pairs of views, a scalar in [-1, 1]; for V = 2, equation 2."""
    num_views, num_images, _ = p.shape
    cosines = torch.einsum("vbd,wbd->vw", F.normalize(p, dim=-1), F.normalize(z, dim=-1)) / num_images
    return (cosines.trace() - cosines.sum()) / (num_views * (num_views - 1))
