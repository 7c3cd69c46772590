import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.train.methods.steps import STEPS, assert_steps, batch, descend, embeddings, sgd
from train.methods import build_method
from train.methods.mocov3 import MoCoV3, MoCoV3Config
from train.methods.networks import Matches
from train.model.draws import Draws
from train.model.encoder import EncoderConfig
from train.processes.distributed import World

_MOMENTUM, _TAU = 0.7, 0.3


def build() -> MoCoV3:
    torch.manual_seed(0)
    config = MoCoV3Config(hidden=16, out=8, tau=_MOMENTUM, temperature=_TAU)
    method = build_method(config, EncoderConfig(name="resnet18", width=8, stem="cifar"), World())
    assert isinstance(method, MoCoV3)
    return method.double()


def contrast(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """``ctr`` of the paper's algorithm 1."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    return F.cross_entropy(q @ k.T / _TAU, torch.arange(len(q))) * 2 * _TAU


def transcribed(method: MoCoV3) -> tuple[list[torch.Tensor], nn.Module]:
    """Algorithm 1, with facebookresearch/moco-v3's cosine of the momentum and its order: teacher first."""
    f_q = nn.Sequential(*(copy.deepcopy(m) for m in (method.encoder, method.projector, method.predictor)))
    f_k = copy.deepcopy(f_q[:2])
    optimizer = sgd(f_q)
    losses = []
    for step in range(STEPS):
        m = 1 - 0.5 * (1 + math.cos(math.pi * step / STEPS)) * (1 - _MOMENTUM)
        with torch.no_grad():
            for k, q in zip(f_k.parameters(), f_q[:2].parameters(), strict=True):
                k.copy_(m * k + (1 - m) * q)
            both = f_k(torch.cat(batch(step))).chunk(2)
        q1, q2 = f_q(torch.cat(batch(step))).chunk(2)
        loss = contrast(q1, both[1]) + contrast(q2, both[0])
        losses.append(descend(optimizer, loss))
    return losses, f_q


def test_steps_are_the_papers() -> None:
    method = build()
    losses, f_q = transcribed(method)
    assert_steps(method, [method.encoder, method.projector, method.predictor], losses, f_q)


def test_more_views_are_all_ordered_pairs() -> None:
    q, k = embeddings(3, 6, 8), embeddings(3, 6, 8, seed=1)
    pairs = [contrast(q[v], k[w]) for v in range(3) for w in range(3) if v != w]
    torch.testing.assert_close(build().loss(Matches(q, k, q)).value, 2 * torch.stack(pairs).mean())


def test_the_teacher_has_no_gradient() -> None:
    method = build()
    made = method(batch(0), Draws(0, 0, torch.arange(6)))
    assert made.predictions.requires_grad
    assert not made.targets.requires_grad
    assert not any(p.requires_grad for t, _ in method.teachers() for p in t.parameters())


def test_a_collapsed_network_has_the_loss_of_chance() -> None:
    same = torch.ones(2, 6, 8).double()
    assert build().loss(Matches(same, same, same)).value.item() == pytest.approx(4 * _TAU * math.log(6))
