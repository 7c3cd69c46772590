"""BYOL (Grill et al., "Bootstrap your own latent: a new approach to self-supervised learning", 2020).

A predictor on the student's projection of one view is to match the teacher's projection of the other (equation 2),
both ways round. The teacher follows the student by an exponential moving average whose tau rises from ``tau`` to 1
along a cosine (section 3.2).

Substituted: torch's initialisation of linear layers; a teacher that starts as a copy (there: by itself). With more than
two views each predicts all others, at twice the mean of the pairs' losses, which for two views is the paper's sum.
"""

from typing import Literal

import torch
import torch.nn.functional as F

from train.methods import Loss, Recipe
from train.methods.networks import Matches, TeacherConfig, WithTeacher
from train.model.draws import Draws


class BYOLConfig(TeacherConfig):
    name: Literal["byol"] = "byol"


class BYOL(WithTeacher):
    Config = BYOLConfig
    recipe = Recipe(
        "byol",
        optim={"learning_rate": 0.2, "weight_decay": 1.5e-6, "epochs": 1000, "warmup_epochs": 10},
        run={"dir": "runs/byol", "global_batch_size": 4096},
    )
    images_meet = False

    def loss(self, e: Matches, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        p, t = F.normalize(e.predictions, dim=-1), F.normalize(e.targets, dim=-1)
        similarity = torch.einsum("ubd,vbd->uvb", p, t)
        mean = (similarity.sum((0, 1)) - similarity.diagonal().sum(1)).mean() / (len(p) * (len(p) - 1))
        return Loss(2 * (2 - 2 * mean), {"teacher_similarity": mean.detach()})
