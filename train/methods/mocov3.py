"""MoCo v3 (Chen, Xie & He, "An empirical study of training self-supervised vision transformers", 2021).

``q = predictor(projector(encoder(view)))`` and ``k = teacher(view)``, the teacher being a moving average of encoder and
projector; the loss is ``2 tau`` times InfoNCE of q among the other view's keys of the global batch, both ways
(equation 1, algorithm 1). The average's tau goes from ``momentum`` to 1 by a cosine.

Kept, for ResNet-50 (facebookresearch/moco-v3): heads of two layers without biases, the projector's last BatchNorm
without scale and offset, keys' BatchNorm with their own batch's statistics over the global batch, the teacher moved
before the next step's keys are made, LARS, the crops' lower bound 0.2 of the area. Substituted: the predictor's last
layer has a bias; torch's initialisation. Beyond the paper: more than two views, as the mean over ordered pairs. For a
ViT the paper freezes the patch projection and uses AdamW and tau 0.2, which the encoder and the recipe here do not.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from train.losses.contrastive import info_nce
from train.methods import Loss, Method, MethodConfig, Recipe, Update, encode
from train.model.draws import Draws
from train.model.encoder import Encoder
from train.model.heads import mlp
from train.model.teacher import follow, teacher_of
from train.optim.schedule import cosine
from train.processes.distributed import World


class MoCoV3Config(MethodConfig):
    name: Literal["mocov3"] = "mocov3"
    temperature: float = Field(1.0, gt=0, description="tau of InfoNCE")
    hidden: int = Field(4096, ge=1, description="width of both heads' hidden layers")
    out: int = Field(256, ge=1, description="dimensions of the embedding")
    layers: int = Field(2, ge=1, description="linear layers of the projector")
    momentum: float = Field(0.99, ge=0, le=1, description="share of the teacher that stays, at the start of the run")


class Embeddings(NamedTuple):
    q: torch.Tensor  # (V, b, D)
    k: torch.Tensor  # (V, b, D) of the teacher
    h: torch.Tensor  # (V, b, F)


class MoCoV3(Method):
    Config = MoCoV3Config
    recipe = Recipe(
        "mocov3",
        {
            "optim": {"name": "lars", "learning_rate": 0.6, "weight_decay": 1e-6, "epochs": 100, "warmup_epochs": 10},
            "run": {"dir": "runs/mocov3", "global_batch_size": 4096},
        },
    )

    def __init__(self, config: MoCoV3Config, encoder: Encoder, world: World) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(encoder.num_features, config.hidden, config.out, config.layers)
        self.projector[-1] = nn.BatchNorm1d(config.out, affine=False)
        self.predictor = mlp(config.out, config.hidden, config.out, last_norm=False)
        self.teacher = teacher_of(nn.Sequential(self.encoder, self.projector))
        self._temperature, self._momentum, self._world = config.temperature, config.momentum, world

    def forward(self, views: list[torch.Tensor], draws: Draws) -> Embeddings:
        h = encode(self.encoder, views)
        with torch.no_grad():
            k = encode(self.teacher, views)
        return Embeddings(self.predictor(self.projector(h)), k, h)

    def loss(self, e: Embeddings, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        keys, offset = self._world.gather(e.k.detach(), dim=1), self._world.rank * e.q.shape[1]
        pairs = [(q, key) for v, q in enumerate(e.q) for w, key in enumerate(keys) if v != w]
        mean = torch.stack([info_nce(q, key, offset, self._temperature) for q, key in pairs]).mean()
        similarity = F.cosine_similarity(e.q[0].detach(), e.k[1].detach(), dim=-1).mean()
        return Loss(4 * self._temperature * mean, {"teacher_similarity": similarity})  # two pairs, each times 2 tau

    def teachers(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.teacher, nn.Sequential(self.encoder, self.projector))]

    def after_update(self, update: Update) -> None:
        follow(self.teachers(), cosine(update.progress, self._momentum, 1.0), update.accepted)
