"""Heads: multi-layer perceptrons from a representation h to an embedding z, or from an embedding to a prediction."""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Discriminator, Field, Tag
from torch import nn

Norm = Literal["batch", "layer", "none"]
Width = Annotated[int, Field(ge=1)]
Widths = Annotated[  # of all hidden layers, or of each
    Annotated[Width, Tag("number")] | Annotated[tuple[Width, ...], Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "number"),
]
_NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


def mlp(
    num_features: int,
    hidden: Widths,
    out: int,
    layers: int = 2,
    *,
    norm: Norm = "batch",
    last_norm: bool = True,
    last_bias: bool = True,
    activation: type[nn.Module] = nn.ReLU,
) -> "MLP":
    """``layers`` linear layers, ``hidden`` wide, or one for each width in ``hidden`` and the last; each is followed by
    a ``norm`` and all but the last by an ``activation``.

    ``last_norm`` says whether the last layer has a norm too, as SimCLR's has (google-research/simclr; two details of
    theirs are not here: that BatchNorm has no bias, and linear layers start at N(0, 0.01) where these start as torch's
    do). Layers that are followed by a norm have no bias, nor has the last one without ``last_bias``.
    """
    modules: list[nn.Module] = []
    widths = [num_features, *((hidden,) * (layers - 1) if isinstance(hidden, int) else hidden), out]
    for number in range(len(widths) - 1):
        last = number == len(widths) - 2
        normed = norm != "none" and (last_norm or not last)
        modules.append(nn.Linear(widths[number], widths[number + 1], bias=not normed and (last_bias or not last)))
        modules += [_NORMS[norm](widths[number + 1])] if normed else []
        modules += [] if last else [activation()]
    return MLP(*modules)


class MLP(nn.Sequential):
    """(..., D) -> (..., ``out``). BatchNorm takes all leading dimensions together, so all views."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = super().forward(x.flatten(0, -2))
        return y.unflatten(0, x.shape[:-1])
