"""Methods of self-supervised learning, one file each."""

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Protocol

import torch
from torch import nn

from train.encoder import EncoderConfig
from train.methods.simclr import SimCLRConfig

MethodConfig = SimCLRConfig  # a union, told apart by `name`, once there are more

# name -> "module:builder"; a builder takes (method config, encoder config, gather, rank)
METHODS = {"simclr": "train.methods.simclr:build"}

Gather = Callable[[torch.Tensor], torch.Tensor]


class Method(Protocol):
    """An `nn.Module` with an ``encoder``, trained in two parts so that embeddings can be made in pieces."""

    @property
    def encoder(self) -> nn.Module: ...

    def forward(self, views: list[torch.Tensor]) -> torch.Tensor:
        """V views (b, 3, H, W) -> embeddings (V, b, D)."""
        ...

    def loss(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """This rank's loss, the mean over its own anchors, and scalars worth logging (detached)."""
        ...

    def after_step(self, progress: float) -> None:
        """Called after each update with the finished fraction of the run, in (0, 1]."""
        ...


def build_method(config: MethodConfig, encoder: EncoderConfig, gather: Gather, rank: int) -> nn.Module:
    """The method on its freshly initialised encoder; the caller seeds torch's generator."""
    method: nn.Module = resolve_name(METHODS[config.name])(config, encoder, gather, rank)
    return method
