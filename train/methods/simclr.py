"""SimCLR (Chen et al., "A simple framework for contrastive learning of visual representations", 2020)."""

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from pipeline.settings import Settings
from train.encoder import Encoder, EncoderConfig
from train.heads import mlp
from train.losses import nt_xent


class SimCLRConfig(Settings):
    min_views: ClassVar[int] = 2  # of each image

    name: Literal["simclr"] = "simclr"
    temperature: float = Field(0.1, gt=0, description="tau of equation 1")
    hidden: int = Field(2048, ge=1, description="width of the projector's hidden layers")
    out: int = Field(128, ge=1, description="dimensions of the embedding")
    layers: int = Field(3, ge=1, description="linear layers of the projector")


class SimCLR(nn.Module):
    """``forward``: V views, each (b, 3, H, W) -> embeddings (V, b, D). Views of one size pass the encoder together."""

    def __init__(
        self,
        config: SimCLRConfig,
        encoder: EncoderConfig,
        gather: Callable[[torch.Tensor], torch.Tensor],
        rank: int,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(encoder)
        self.projector = mlp(self.encoder.num_features, config.hidden, config.out, config.layers)
        self._temperature, self._gather, self._rank = config.temperature, gather, rank

    def forward(self, views: list[torch.Tensor]) -> torch.Tensor:
        h = torch.cat([self.encoder(torch.cat(group)) for group in same_size(views)])
        z: torch.Tensor = self.projector(h).float()  # as gradients of gathered embeddings are summed over ranks
        return z.view(len(views), len(views[0]), -1)

    def loss(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        num_anchors = embeddings.shape[1]
        keys = self._gather(embeddings.transpose(0, 1)).transpose(0, 1)
        loss = nt_xent(embeddings, keys, self._rank * num_anchors, self._temperature)
        z = F.normalize(embeddings.detach().float(), dim=-1)
        return loss, {"alignment": (z[0] * z[1]).sum(-1).mean()}

    def after_step(self, progress: float) -> None:
        """SimCLR keeps nothing beside its weights."""


def same_size(views: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Runs of consecutive views of equal shape."""
    groups: list[list[torch.Tensor]] = []
    for view in views:
        if groups and groups[-1][0].shape == view.shape:
            groups[-1].append(view)
        else:
            groups.append([view])
    return groups


build = SimCLR
