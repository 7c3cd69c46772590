"""What methods share that are an encoder, a projector, and a loss of the embeddings."""

from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field

from train.methods import Method, MethodConfig, encode, same_size
from train.model.draws import Draws
from train.model.encoder import Encoder
from train.model.heads import mlp
from train.processes.distributed import World


class ProjectorConfig(MethodConfig):
    hidden: int = Field(2048, ge=1, description="width of the projector's hidden layers")
    out: int = Field(128, ge=1, description="dimensions of the embedding")
    layers: int = Field(3, ge=1, description="linear layers of the projector")


class Embeddings(NamedTuple):
    z: torch.Tensor  # (V, b, D)
    h: torch.Tensor  # (V, b, F)


class Projected(Method):
    """``z = projector(encoder(view))``; ``head`` are the options of the projector's `mlp`."""

    head: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: ProjectorConfig, encoder: Encoder, world: World) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(encoder.num_features, config.hidden, config.out, config.layers, **self.head)
        self._config: Any = config  # the method's own kind
        self._world = world

    def forward(self, views: list[torch.Tensor], draws: Draws) -> Any:
        h = encode(self.encoder, views)
        return Embeddings(self.projector(h), h)


class Centred(NamedTuple):
    z: torch.Tensor  # (V, b, D)
    centre: torch.Tensor  # (1, b, D): the mean over global views
    h: torch.Tensor  # (V, b, F)


class Predicted(Projected):
    """Each view predicts the mean of the image's global views: the first ones of one size."""

    def forward(self, views: list[torch.Tensor], draws: Draws) -> Centred:
        z, h = super().forward(views, draws)
        return Centred(z, z[: len(same_size(views)[0])].mean(0, keepdim=True), h)
