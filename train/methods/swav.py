"""SwAV (Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments", 2020).

``z = normalise(projector(encoder(view)))``, ``scores = z C`` for K unit prototypes C. The codes of the first two views
are their scores after Sinkhorn and Knopp's algorithm over the global batch (equation 3); each other view predicts them
by ``softmax(scores / temperature)`` (equations 1 and 2, section 3.2 for multi-crop).

Substituted: LARS with the learning rate inside the momentum, where the authors' LARC has it outside; warm-up starts
near 0, not at a sixteenth of the peak.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from train.losses.clustering import entropy, sinkhorn, swapped_prediction
from train.methods import Loss, Recipe, Update, encode
from train.methods.networks import Projected, ProjectorConfig
from train.model.draws import Draws
from train.model.encoder import Encoder
from train.model.queue import Queue
from train.processes.distributed import World

_ASSIGNED = 2  # views that get codes: the full crops


class SwAVConfig(ProjectorConfig):
    min_global: ClassVar[int] = _ASSIGNED
    name: Literal["swav"] = "swav"
    temperature: float = Field(0.1, gt=0, description="of predictions")
    layers: int = Field(2, ge=1, description="linear layers of the projector")
    prototypes: int = Field(3000, ge=2, description="prototypes that views are assigned to")
    epsilon: float = Field(0.05, gt=0, description="smoothness of the codes")
    iterations: int = Field(3, ge=1, description="of Sinkhorn and Knopp's algorithm")
    frozen: float = Field(0.00125, ge=0, le=1, description="fraction of the run in which prototypes stay as they are")
    queue: int = Field(0, ge=0, description="embeddings of former batches that share in the codes; 3840 at batch 256")
    queue_starts: float = Field(0.075, ge=0, le=1, description="fraction of the run after which they are kept")


class Scores(NamedTuple):
    scores: torch.Tensor  # (V, b, K), cosines
    z: torch.Tensor  # (V, b, D), of length 1
    h: torch.Tensor  # (V, b, F)


class SwAV(Projected):
    Config = SwAVConfig
    head: ClassVar = {"last_norm": False}
    recipe = Recipe(
        "multicrop-2x224+6x96",
        optim={"name": "lars", "learning_rate": 0.3, "final_learning_rate": 0.001, "weight_decay": 1e-6}
        | {"exclude": [], "epochs": 800, "warmup_epochs": 10},
        run={"dir": "runs/swav", "global_batch_size": 4096},
    )
    progress: torch.Tensor
    queued: torch.Tensor

    def __init__(self, config: SwAVConfig, encoder: Encoder, world: World) -> None:
        super().__init__(config, encoder, world)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(config.prototypes, config.out), dim=1))
        self.register_buffer("progress", torch.zeros(()))
        queues = [Queue(config.queue, config.out) for _ in range(_ASSIGNED if config.queue else 0)]
        self.queues: Sequence[Any] = nn.ModuleList(queues)  # type: ignore[assignment]
        self.register_buffer("queued", torch.zeros((), dtype=torch.int64), persistent=config.queue > 0)

    def forward(self, views: list[torch.Tensor], draws: Draws) -> Scores:
        h = encode(self.encoder, views)
        z = F.normalize(self.projector(h), dim=-1)
        frozen = self.progress < self._config.frozen
        return Scores(z @ torch.where(frozen, self.prototypes.detach(), self.prototypes).T, z, h)

    def loss(self, e: Scores, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        images = e.scores.shape[1]
        own = slice(self._world.rank * images, (self._world.rank + 1) * images)
        everyones = self._world.gather(e.scores[:_ASSIGNED].detach(), dim=1)
        value = swapped_prediction(e.scores / self._config.temperature, self._codes(everyones)[:, own])
        predictions = (everyones / self._config.temperature).softmax(-1)
        return Loss(
            value,
            {
                "prediction_entropy": entropy(predictions).mean(),
                "prototypes_used": entropy(predictions.mean((0, 1))).exp(),
            },
        )

    @torch.no_grad()
    def _codes(self, scores: torch.Tensor) -> torch.Tensor:
        """Of the scores (2, B, K) of the global batch; together with those of the queues once these are full."""
        assign = partial(sinkhorn, epsilon=self._config.epsilon, iterations=self._config.iterations)
        codes = torch.stack([assign(view) for view in scores])
        if not self.queues:
            return codes
        queued = [torch.cat([queue.rows @ self.prototypes.T, s]) for queue, s in zip(self.queues, scores, strict=True)]
        together = torch.stack([assign(both)[-len(codes[0]) :] for both in queued])
        return torch.where(self.queued >= self._config.queue, together, codes)

    def after_update(self, update: Update) -> None:
        accepted = update.accepted > 0
        kept = update.accepted * (update.progress > self._config.queue_starts)
        if self.queues:
            for queue, z in zip(self.queues, self._world.gather(update.e.z[:_ASSIGNED], dim=1), strict=True):
                queue.push(z, kept)
            self.queued.add_((update.e.z.shape[1] * self._world.size * kept).long())
        unit = F.normalize(self.prototypes, dim=1)
        self.prototypes.copy_(torch.where(accepted, unit, self.prototypes))
        self.progress.copy_(torch.where(accepted, update.progress, self.progress))
