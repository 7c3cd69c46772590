"""A teacher: a copy of a network that follows it by an exponential moving average and is not trained itself."""

import copy
from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def teacher_of(student: Network) -> Network:
    """A copy of ``student`` without gradients."""
    return copy.deepcopy(student).requires_grad_(False)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, tau: float, accepted: torch.Tensor) -> None:
    """``teacher <- tau teacher + (1 - tau) student`` for all parameters where ``accepted`` (a scalar on their device)
    is 1, nothing where it is 0. Buffers (BatchNorm's statistics) are the teacher's own."""
    ours: list[torch.Tensor] = list(teacher.parameters())
    theirs: list[torch.Tensor] = list(student.parameters())
    change = list(torch._foreach_sub(theirs, ours))
    torch._foreach_mul_(change, (1 - tau) * accepted.double())  # a float32 would round tau, in float64 runs too
    torch._foreach_add_(ours, change)
