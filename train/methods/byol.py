"""BYOL (Grill et al., "Bootstrap your own latent: a new approach to self-supervised learning", 2020).

A predictor on the student's projection of one view is to match the teacher's projection of the other (equation 2),
both ways round. The teacher follows the student by an exponential moving average whose tau rises from ``tau`` to 1
along a cosine (section 3.2).

Kept: symmetric loss on normalised vectors; projector and predictor of two layers, 4096 and 256 wide, with BatchNorm
inside and none at the end; both views' own augmentations; the schedule of tau; LARS without decay and adaptation of
biases and BatchNorm. Substituted: torch's initialisation of linear layers; crops are resized bilinearly (the paper's
bicubically). With more than two views each predicts all others, at twice the mean of the pairs' losses, which for two
views is the paper's sum.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from train.methods import Loss, Method, MethodConfig, Recipe, Update, encode
from train.model.draws import Draws
from train.model.encoder import Encoder
from train.model.heads import mlp
from train.model.teacher import follow, teacher_of
from train.optim.schedule import cosine
from train.processes.distributed import World


class BYOLConfig(MethodConfig):
    name: Literal["byol"] = "byol"
    tau: float = Field(0.996, ge=0, le=1, description="share of the teacher that an update keeps, at the start")
    hidden: int = Field(4096, ge=1, description="width of the projector's and predictor's hidden layer")
    out: int = Field(256, ge=1, description="dimensions of projection and prediction")


class Embeddings(NamedTuple):
    predictions: torch.Tensor  # (V, b, D), of the student
    targets: torch.Tensor  # (V, b, D), of the teacher, without gradient
    h: torch.Tensor  # (V, b, F)


class BYOL(Method):
    Config = BYOLConfig
    recipe = Recipe(
        "byol",
        {
            "optim": {"learning_rate": 0.2, "weight_decay": 1.5e-6, "epochs": 1000, "warmup_epochs": 10},
            "run": {"dir": "runs/byol", "global_batch_size": 4096},
        },
    )
    images_meet = False

    def __init__(self, config: BYOLConfig, encoder: Encoder, world: World) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(encoder.num_features, config.hidden, config.out, last_norm=False)
        self.predictor = mlp(config.out, config.hidden, config.out, last_norm=False)
        self.teacher_encoder, self.teacher_projector = teacher_of(self.encoder), teacher_of(self.projector)
        self._tau = config.tau

    def forward(self, views: list[torch.Tensor], draws: Draws) -> Embeddings:
        h = encode(self.encoder, views)
        with torch.no_grad():
            targets = self.teacher_projector(encode(self.teacher_encoder, views))
        return Embeddings(self.predictor(self.projector(h)), targets, h)

    def loss(self, e: Embeddings, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        p, t = F.normalize(e.predictions, dim=-1), F.normalize(e.targets, dim=-1)
        similarity = torch.einsum("ubd,vbd->uvb", p, t)
        mean = (similarity.sum((0, 1)) - similarity.diagonal().sum(1)).mean() / (len(p) * (len(p) - 1))
        return Loss(2 * (2 - 2 * mean), {"teacher_similarity": mean.detach()})

    def teachers(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.teacher_encoder, self.encoder), (self.teacher_projector, self.projector)]

    def after_update(self, update: Update) -> None:
        follow(self.teachers(), cosine(update.progress, self._tau, 1.0), update.accepted)
