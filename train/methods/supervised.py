"""Supervised classification: the baseline (Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour",
2017).

``logits = classifier(encoder(view))``; the loss is the cross entropy with the label, averaged over views.
"""

from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from train.methods import Loss, Method, MethodConfig, Recipe, encode
from train.model.draws import Draws
from train.model.encoder import Encoder
from train.processes.distributed import World


class SupervisedConfig(MethodConfig):
    min_views: ClassVar[int] = 1

    name: Literal["supervised"] = "supervised"
    num_classes: int = Field(1000, ge=2, description="labels are 0 to num_classes - 1")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all classes")


class Logits(NamedTuple):
    logits: torch.Tensor  # (V, b, num_classes)
    h: torch.Tensor  # (V, b, F)


class Supervised(Method):
    Config = SupervisedConfig
    recipe = Recipe(
        "supervised",
        optim={"name": "sgd", "nesterov": True, "learning_rate": 0.1, "weight_decay": 1e-4}
        | {"epochs": 90, "warmup_epochs": 5, "schedule": "step", "milestones": [1 / 3, 2 / 3, 8 / 9]},
        run={"dir": "runs/supervised", "global_batch_size": 8192, "batchnorm": "local"},
    )
    images_meet = False
    takes_labels = True

    def __init__(self, config: SupervisedConfig, encoder: Encoder, world: World) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.num_features, config.num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        self._label_smoothing = config.label_smoothing

    def forward(self, views: list[torch.Tensor], draws: Draws) -> Logits:
        h = encode(self.encoder, views)
        return Logits(self.classifier(h), h)

    def loss(self, e: Logits, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        assert labels is not None
        logits, targets = e.logits.flatten(0, 1), labels.repeat(len(e.logits))
        value = F.cross_entropy(logits, targets, label_smoothing=self._label_smoothing)
        return Loss(value, {"accuracy": (logits.argmax(1) == targets).to(logits.dtype).mean()})
