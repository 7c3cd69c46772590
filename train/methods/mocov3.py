"""MoCo v3 (Chen, Xie & He, "An empirical study of training self-supervised vision transformers", 2021).

``q = predictor(projector(encoder(view)))`` and ``k = teacher(view)``, the teacher being a moving average of encoder and
projector; the loss is ``2 tau`` times InfoNCE of q among the other view's keys of the global batch, both ways
(equation 1, algorithm 1). The share that the average keeps goes to 1 by a cosine.

Substituted: LARS with the learning rate inside the momentum. Beyond the paper: more than two views, as
the mean over ordered pairs. For a ViT the paper freezes the patch projection and uses AdamW and tau 0.2, which the
encoder and the recipe here do not.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from train.losses.contrastive import info_nce
from train.methods import Loss, Recipe
from train.methods.networks import Matches, TeacherConfig, WithTeacher
from train.model.draws import Draws
from train.model.encoder import Encoder
from train.processes.distributed import World


class MoCoV3Config(TeacherConfig):
    name: Literal["mocov3"] = "mocov3"
    temperature: float = Field(1.0, gt=0, description="tau of InfoNCE")
    tau: float = Field(0.99, ge=0, le=1, description="share of the teacher that an update keeps, at the start")


class MoCoV3(WithTeacher):
    Config = MoCoV3Config
    recipe = Recipe(
        "mocov3",
        optim={"name": "lars", "learning_rate": 0.6, "weight_decay": 1e-6, "epochs": 100, "warmup_epochs": 10},
        run={"dir": "runs/mocov3", "global_batch_size": 4096},
    )

    head: ClassVar = {}

    def __init__(self, config: MoCoV3Config, encoder: Encoder, world: World) -> None:
        super().__init__(config, encoder, world)
        for projector in (self.projector, self.teacher_projector):
            projector[-1] = nn.BatchNorm1d(config.out, affine=False)

    def loss(self, e: Matches, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        keys, offset = self._world.gather(e.targets.detach(), dim=1), self._world.rank * e.predictions.shape[1]
        pairs = [(q, key) for v, q in enumerate(e.predictions) for w, key in enumerate(keys) if v != w]
        mean = torch.stack([info_nce(q, key, offset, self._config.temperature) for q, key in pairs]).mean()
        similarity = F.cosine_similarity(e.predictions[0].detach(), e.targets[1].detach(), dim=-1).mean()
        return Loss(4 * self._config.temperature * mean, {"teacher_similarity": similarity})  # 2 pairs, each 2 tau
