"""A teacher: a copy of a network that follows it by an exponential moving average and is not trained itself."""

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn

from train.processes.fsdp import local, whole

Network = TypeVar("Network", bound=nn.Module)


def teacher_of(student: Network) -> Network:
    """A copy of ``student`` without gradients."""
    return copy.deepcopy(student).requires_grad_(False)


Pairs = Iterable[tuple[nn.Module, nn.Module]]  # of a teacher and the student that it follows


@torch.no_grad()
def follow(pairs: Pairs, tau: float, accepted: torch.Tensor) -> None:
    """``teacher <- tau teacher + (1 - tau) student`` for all parameters where ``accepted`` (a scalar on their device)
    is 1, nothing where it is 0. Buffers (BatchNorm's statistics) are the teacher's own."""
    teachers, students = ([local(p) for p in parameters] for parameters in _parameters(pairs))
    change = list(torch._foreach_sub(students, teachers))
    torch._foreach_mul_(change, (1 - tau) * accepted.double())  # a float32 would round tau, in float64 runs too
    torch._foreach_add_(teachers, change)


@torch.no_grad()
def distance(pairs: Pairs) -> torch.Tensor:
    """``|teacher - student| / |student|`` over all parameters, a scalar. Synchronises ranks if they hold shards."""
    teachers, students = _parameters(pairs)
    apart = torch.nn.utils.get_total_norm(torch._foreach_sub(teachers, students))
    distance: torch.Tensor = whole(apart / torch.nn.utils.get_total_norm(students))
    return distance


def _parameters(pairs: Pairs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of all teachers, and of all students."""
    both = [list(zip(t.parameters(), s.parameters(), strict=True)) for t, s in pairs]
    return [t for pair in both for t, _ in pair], [s for pair in both for _, s in pair]
