"""SwAV (Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments", 2020).

``z = normalise(projector(encoder(view)))``, ``scores = z C`` for K unit prototypes C. The codes of the first two views
are their scores after Sinkhorn and Knopp's algorithm over the global batch (equation 3); each other view predicts them
by ``softmax(scores / temperature)`` (equations 1 and 2, section 3.2 for multi-crop).

Kept: the projector of two layers, codes without gradient and without rounding, prototypes of unit length after each
update, frozen at first (a fraction of the run here: one epoch of 800 by default), views, decay and adaptation of all
parameters, cosine to 0.001 of the peak. Substituted: LARS with the learning rate inside the momentum, where the
authors' LARC has it outside; warm-up starts near 0, not at a sixteenth of the peak. Left out: the queue, which the
authors add to batches of 256; so batches should not be much smaller than the number of prototypes.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from train.losses.clustering import entropy, sinkhorn, swapped_prediction
from train.methods import Loss, Method, MethodConfig, Recipe, Update, encode
from train.model.draws import Draws
from train.model.encoder import Encoder
from train.model.heads import mlp
from train.processes.distributed import World

_ASSIGNED = 2  # views that get codes: the full crops


class SwAVConfig(MethodConfig):
    name: Literal["swav"] = "swav"
    temperature: float = Field(0.1, gt=0, description="of predictions")
    hidden: int = Field(2048, ge=1, description="width of the projector's hidden layer")
    out: int = Field(128, ge=1, description="dimensions of the embedding")
    prototypes: int = Field(3000, ge=2, description="prototypes that views are assigned to")
    epsilon: float = Field(0.05, gt=0, description="smoothness of the codes")
    iterations: int = Field(3, ge=1, description="of Sinkhorn and Knopp's algorithm")
    frozen: float = Field(0.00125, ge=0, le=1, description="fraction of the run in which prototypes stay as they are")


class Scores(NamedTuple):
    scores: torch.Tensor  # (V, b, K), cosines


class SwAV(Method):
    Config = SwAVConfig
    recipe = Recipe(
        "multicrop-2x224+6x96",
        {
            "optim": {"name": "lars", "learning_rate": 0.3, "final_learning_rate": 0.001, "weight_decay": 1e-6}
            | {"exclude": [], "epochs": 800, "warmup_epochs": 10},
            "run": {"dir": "runs/swav", "global_batch_size": 4096},
        },
    )
    progress: torch.Tensor

    def __init__(self, config: SwAVConfig, encoder: Encoder, world: World) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(encoder.num_features, config.hidden, config.out, last_norm=False)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(config.prototypes, config.out), dim=1))
        self.register_buffer("progress", torch.zeros(()))
        self._config, self._world = config, world

    def forward(self, views: list[torch.Tensor], draws: Draws) -> Scores:
        z = F.normalize(self.projector(encode(self.encoder, views)), dim=-1)
        frozen = self.progress < self._config.frozen
        scores = z @ torch.where(frozen, self.prototypes.detach(), self.prototypes).T
        return Scores(scores.view(len(views), len(views[0]), -1))

    def loss(self, e: Scores, labels: torch.Tensor | None = None) -> Loss:
        images = e.scores.shape[1]
        own = slice(self._world.rank * images, (self._world.rank + 1) * images)
        everyones = self._world.gather(e.scores[:_ASSIGNED].detach(), dim=1)
        codes = [sinkhorn(scores, self._config.epsilon, self._config.iterations)[own] for scores in everyones]
        value = swapped_prediction(e.scores / self._config.temperature, torch.stack(codes))
        predictions = (everyones / self._config.temperature).softmax(-1)
        return Loss(
            value,
            {
                "prediction_entropy": entropy(predictions).mean(),
                "prototypes_used": entropy(predictions.mean((0, 1))).exp(),
            },
        )

    def after_update(self, update: Update) -> None:
        accepted = update.accepted > 0
        unit = F.normalize(self.prototypes, dim=1)
        self.prototypes.copy_(torch.where(accepted, unit, self.prototypes))
        self.progress.copy_(torch.where(accepted, update.progress, self.progress))
