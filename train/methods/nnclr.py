"""NNCLR (Dwibedi et al., "With a little help from my friends: nearest-neighbor contrastive learning of visual
representations", 2021).

``z = projector(encoder(view))``, ``p = predictor(z)``; ``nn(z)`` is the nearest of a queue of former z. The loss is
InfoNCE of each view's nn(z) among the other view's p of the global batch (equations 3 and 4, algorithm 1).

The authors have released no code: the loss is solo-learn's too, settings are a VISSL recipe's (docs/methods.md).
Substituted: torch's initialisation. Beyond the paper: more than two views, as the mean over ordered pairs.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from train.losses.contrastive import info_nce
from train.methods import Loss, Recipe, Update
from train.methods.networks import Predictions, PredictorConfig, WithPredictor
from train.model.draws import Draws
from train.model.encoder import Encoder
from train.model.queue import Queue
from train.processes.distributed import World


class NNCLRConfig(PredictorConfig):
    name: Literal["nnclr"] = "nnclr"
    temperature: float = Field(0.1, gt=0, description="tau of equation 3")
    out: int = Field(256, ge=1, description="dimensions of the embedding")
    predictor_hidden: int = Field(4096, ge=1, description="width of the predictor's hidden layer")
    queue: int = Field(98304, ge=1, description="embeddings among which the nearest is looked for")


class NNCLR(WithPredictor):
    Config = NNCLRConfig
    recipe = Recipe(
        "byol",
        optim={"name": "lars", "learning_rate": 0.3, "weight_decay": 1e-6, "epochs": 1000, "warmup_epochs": 10},
        run={"dir": "runs/nnclr", "global_batch_size": 4096},
    )

    def __init__(self, config: NNCLRConfig, encoder: Encoder, world: World) -> None:
        super().__init__(config, encoder, world)
        self.queue = Queue(config.queue, config.out)

    def loss(self, e: Predictions, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        z = F.normalize(e.z.detach(), dim=-1)
        similarity, nearest = (z @ self.queue.rows.T).max(-1)  # (V, b)
        neighbours, predictions = self.queue.rows[nearest], self._world.gather(e.p, dim=1)
        offset = self._world.rank * e.p.shape[1]
        pairs = [(n, p) for v, n in enumerate(neighbours) for w, p in enumerate(predictions) if v != w]
        value = torch.stack([info_nce(n, p, offset, self._config.temperature) for n, p in pairs]).mean()
        return Loss(value, {"neighbour_similarity": similarity.mean()})

    def after_update(self, update: Update) -> None:
        self.queue.push(self._world.gather(update.e.z[0]), update.accepted)
