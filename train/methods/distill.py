"""Distillation: an encoder learns the representations of a frozen one, which sees the same views.

``z = projector(encoder(view))`` has the dimensions of the teacher's representation t. The objective is one of

    feature   2 - 2 cos(z, t)
    seed      SEED (Fang et al., "SEED: self-supervised distillation for visual representation", 2021, equation 5): z's
              similarities with t and with a queue of former t are to be distributed as t's are

Substituted: t is what the teacher exports, where the authors keep its projector too; the projector ends in as many
dimensions (there 128); two views of an image (there one), whose losses are averaged; a cosine from the first step
(there the peak for 5 epochs first). The queue takes the first view's t.
"""

from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field

from train.losses.reconstruction import similarity_distillation
from train.methods import Loss, Method, MethodConfig, Recipe, Update, encode
from train.model.draws import Draws
from train.model.encoder import Encoder, EncoderConfig
from train.model.heads import mlp
from train.model.queue import Queue
from train.processes.distributed import World


class DistillConfig(MethodConfig):
    min_views: ClassVar[int] = 1

    name: Literal["distill"] = "distill"
    teacher: EncoderConfig = EncoderConfig()
    weights: Path | None = Field(
        None, description="the teacher's: a run, a checkpoint or a torch file; none: untrained"
    )
    objective: Literal["seed", "feature"] = Field("seed", description="what is to be like the teacher's")
    hidden: int = Field(512, ge=1, description="width of the projector's hidden layer")
    queue: int = Field(65536, ge=1, description="seed: representations of former images")
    temperature: float = Field(0.2, gt=0, description="seed: of the student's similarities")
    teacher_temperature: float = Field(0.01, gt=0, description="seed: of the teacher's")


class Representations(NamedTuple):
    z: torch.Tensor  # (V, b, D)
    t: torch.Tensor  # (V, b, D), the teacher's, without gradient
    h: torch.Tensor  # (V, b, F)


class Distill(Method):
    Config = DistillConfig
    recipe = Recipe(
        "mocov2",
        encoder={"name": "resnet18"},
        optim={"name": "sgd", "learning_rate": 0.03, "weight_decay": 1e-4, "exclude": []}
        | {"epochs": 200, "warmup_epochs": 0},
        run={"dir": "runs/distill", "global_batch_size": 256},
    )
    images_meet = False  # but those of former batches

    def __init__(self, config: DistillConfig, encoder: Encoder, world: World) -> None:
        super().__init__()
        self.encoder, self.teacher = encoder, Encoder(config.teacher).requires_grad_(False).eval()
        self.projector = mlp(encoder.num_features, config.hidden, self.teacher.num_features, norm="none")
        if config.objective == "seed":
            self.queue = Queue(config.queue, self.teacher.num_features)
        self._config, self._world = config, world

    def train(self, mode: bool = True) -> "Distill":
        super().train(mode)
        self.teacher.eval()
        return self

    def pretrained(self) -> list[tuple[Encoder, Path | None]]:
        return [(self.teacher, self._config.weights)]

    def forward(self, views: list[torch.Tensor], draws: Draws) -> Representations:
        h = encode(self.encoder, views)
        with torch.no_grad():
            t = encode(self.teacher, views)
        return Representations(self.projector(h), t, h)

    def loss(self, e: Representations, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        similarity = F.cosine_similarity(e.z, e.t, dim=-1).mean()
        value = 2 - 2 * similarity
        if self._config.objective == "seed":
            temperatures = self._config.temperature, self._config.teacher_temperature
            value = similarity_distillation(e.z.flatten(0, 1), e.t.flatten(0, 1), self.queue.rows, *temperatures)
        return Loss(value, {"teacher_similarity": similarity.detach()})

    def after_update(self, update: Update) -> None:
        if self._config.objective == "seed":
            self.queue.push(self._world.gather(update.e.t[0]), update.accepted)
