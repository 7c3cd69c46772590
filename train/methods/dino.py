"""DINO (Caron et al., "Emerging properties in self-supervised vision transformers", 2021).

``s = head(encoder(view))`` of all views, ``t`` the same of a teacher that follows by a moving average and sees the
first two, global views. Each view predicts, by ``softmax(s / 0.1)``, the teacher's ``softmax((t - centre) / tau)`` of
every other global view (equations 2 and 3); the centre follows the mean of t over the global batch (equation 4).

Frozen and warmed up for fractions of the run. Substituted: timm's ViT and its initialisation; drop path
is in configs/imagenet-dino.yaml, as only ViTs have it. Left out: main_dino.py's bound of 3.0 on the norm of each
tensor's gradient, and gains of the last layer that are trained, which it recommends for a ViT-S.
"""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from train.losses.clustering import entropy, swapped_prediction
from train.methods import Loss, Method, MethodConfig, Recipe, Update, encode
from train.model.draws import Draws
from train.model.encoder import Encoder
from train.model.heads import mlp
from train.model.teacher import follow, teacher_of
from train.optim.schedule import cosine
from train.processes.distributed import World

_GLOBAL = 2  # views that the teacher sees


class DINOConfig(MethodConfig):
    min_global: ClassVar[int] = _GLOBAL
    name: Literal["dino"] = "dino"
    hidden: int = Field(2048, ge=1, description="width of the head's hidden layers")
    bottleneck: int = Field(256, ge=1, description="dimensions before the last layer")
    out: int = Field(65536, ge=2, description="dimensions of the distributions")
    norm: Literal["batch", "none"] = Field("none", description="of the head's hidden layers; batch with ResNets")
    momentum: float = Field(0.996, ge=0, le=1, description="of the teacher at the start; a cosine takes it to 1")
    temperature: float = Field(0.1, gt=0, description="the student's")
    teacher_temperature: float = Field(0.07, gt=0, description="the teacher's, after its warm-up")
    warmup_temperature: float = Field(0.04, gt=0, description="the teacher's at the start")
    warmup: float = Field(0.0375, ge=0, le=1, description="fraction of the run in which it rises: 30 epochs of 800")
    centre_momentum: float = Field(0.9, ge=0, le=1, description="of the centre")
    frozen: float = Field(0.00125, ge=0, le=1, description="fraction of the run in which the last layer stays: 1 epoch")


class Head(nn.Module):
    """h (..., D) -> logits (..., ``out``): `mlp` to a bottleneck, then a weight-normalised linear layer without bias
    whose gains are 1. So they are cosines to the rows of ``weight``, whatever the lengths of these."""

    def __init__(self, num_features: int, config: DINOConfig) -> None:
        super().__init__()
        layers = {"norm": config.norm, "last_norm": False, "activation": nn.GELU}
        self.mlp = mlp(num_features, config.hidden, config.bottleneck, 3, **layers)  # type: ignore[arg-type]
        self.weight = nn.Parameter(torch.empty(config.out, config.bottleneck))
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, h: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
        weight = torch.where(frozen, self.weight.detach(), self.weight)
        return F.normalize(self.mlp(h), dim=-1) @ F.normalize(weight, dim=-1).T


class Logits(NamedTuple):
    student: torch.Tensor  # (V, b, K)
    teacher: torch.Tensor  # (2, b, K), without gradient
    h: torch.Tensor  # (V, b, F)


class DINO(Method):
    Config = DINOConfig
    recipe = Recipe(
        "dino",
        encoder={"name": "timm:vit_small_patch16_224"},
        optim={"name": "adamw", "learning_rate": 5e-4, "final_learning_rate": 5e-4}
        | {"weight_decay": 0.04, "weight_decay_end": 0.4, "epochs": 800, "warmup_epochs": 10},
        run={"dir": "runs/dino", "global_batch_size": 1024},
    )
    images_meet = False
    centre: torch.Tensor
    progress: torch.Tensor

    def __init__(self, config: DINOConfig, encoder: Encoder, world: World) -> None:
        super().__init__()
        self.encoder, self.head = encoder, Head(encoder.num_features, config)
        self.teacher_encoder, self.teacher_head = teacher_of(encoder), teacher_of(self.head)
        self.register_buffer("centre", torch.zeros(config.out))
        self.register_buffer("progress", torch.zeros(()))
        self._config, self._world = config, world

    def forward(self, views: list[torch.Tensor], draws: Draws) -> Logits:
        frozen = self.progress < self._config.frozen
        h = encode(self.encoder, views)
        with torch.no_grad():
            teacher = self.teacher_head(encode(self.teacher_encoder, views[:_GLOBAL]), frozen)
        return Logits(self.head(h, frozen), teacher, h)

    def loss(self, e: Logits, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        targets = ((e.teacher - self.centre) / self._teacher_temperature()).softmax(-1)
        value = swapped_prediction(e.student / self._config.temperature, targets)
        certainty = entropy(targets).mean()
        metrics = {"teacher_entropy": certainty, "divergence": value.detach() - certainty}
        return Loss(value, metrics | {"teacher_entropy_percent": 100 * certainty / math.log(targets.shape[-1])})

    def teachers(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.teacher_encoder, self.encoder), (self.teacher_head, self.head)]

    def after_update(self, update: Update) -> None:
        follow(self.teachers(), cosine(update.progress, self._config.momentum, 1.0), update.accepted)
        accepted, mean = update.accepted > 0, self._world.mean(update.e.teacher.mean((0, 1)))
        moved = torch.lerp(mean.to(self.centre.dtype), self.centre, self._config.centre_momentum)
        self.centre.copy_(torch.where(accepted, moved, self.centre))
        self.progress.copy_(torch.where(accepted, update.progress, self.progress))

    def exported(self) -> Encoder:
        return self.teacher_encoder

    def _teacher_temperature(self) -> torch.Tensor:
        """Linear over the warm-up."""
        start, end = self._config.warmup_temperature, self._config.teacher_temperature
        return start + (end - start) * (self.progress / max(self._config.warmup, 1e-12)).clamp(max=1.0)
