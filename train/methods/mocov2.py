"""MoCo v2 (He et al., "Momentum contrast", 2020; Chen et al., "Improved baselines with momentum contrastive learning",
2020).

``q = projector(encoder(view 1))`` and ``k = teacher(view 2)``, the teacher being a moving average of encoder and
projector; the loss is InfoNCE (equation 1) of q with its k against a queue of the keys of former batches (algorithm 1).

Substituted: "shuffle BN", with which no query shares BatchNorm statistics with its key, by statistics over the global
batch, which do not tell which images are together; where a batch passes in pieces its statistics are those of a piece.
The queue need not be a multiple of the batch.
"""

from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from train.losses.contrastive import contrast_accuracy, queue_logits
from train.methods import Loss, Recipe, Update, encode
from train.methods.networks import Projected, ProjectorConfig
from train.model.draws import Draws
from train.model.encoder import Encoder
from train.model.queue import Queue
from train.model.teacher import follow, teacher_of
from train.processes.distributed import World


class MoCoV2Config(ProjectorConfig):
    name: Literal["mocov2"] = "mocov2"
    temperature: float = Field(0.2, gt=0, description="tau of InfoNCE")
    layers: int = Field(2, ge=1, description="linear layers of the projector")
    queue: int = Field(65536, ge=1, description="keys of former batches, the negatives")
    momentum: float = Field(0.999, ge=0, le=1, description="share of the teacher that stays at each step")


class Embeddings(NamedTuple):
    q: torch.Tensor  # (1, b, D) of the first view
    k: torch.Tensor  # (1, b, D) of the second, by the teacher
    h: torch.Tensor  # (1, b, F) of the first


class MoCoV2(Projected):
    Config = MoCoV2Config
    head: ClassVar = {"norm": "none"}
    recipe = Recipe(
        "mocov2",
        optim={"name": "sgd", "learning_rate": 0.03, "weight_decay": 1e-4, "exclude": []}
        | {"epochs": 200, "warmup_epochs": 0},
        run={"dir": "runs/mocov2", "global_batch_size": 256},
    )
    images_meet: ClassVar[bool] = False  # but those of former batches

    def __init__(self, config: MoCoV2Config, encoder: Encoder, world: World) -> None:
        super().__init__(config, encoder, world)
        self.teacher = teacher_of(nn.Sequential(self.encoder, self.projector))
        self.queue = Queue(config.queue, config.out)

    def forward(self, views: list[torch.Tensor], draws: Draws) -> Embeddings:
        """Of more than two views, the first two."""
        h = encode(self.encoder, views[:1])
        with torch.no_grad():
            k = encode(self.teacher, views[1:2])
        return Embeddings(self.projector(h), k, h)

    def loss(self, e: Embeddings, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        q, k = e.q[0], e.k[0].detach()
        logits = queue_logits(q, k, self.queue.rows, self._config.temperature)
        accuracy = contrast_accuracy(logits[:, 0], logits[:, 1:])
        similarity = F.cosine_similarity(q.detach(), k, dim=-1).mean()
        value = F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.int64))
        return Loss(value, {"teacher_similarity": similarity, **accuracy})

    def teachers(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.teacher, nn.Sequential(self.encoder, self.projector))]

    def after_update(self, update: Update) -> None:
        follow(self.teachers(), self._config.momentum, update.accepted)
        self.queue.push(self._world.gather(update.e.k[0]), update.accepted)
