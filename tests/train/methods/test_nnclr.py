import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.train.methods.steps import STEPS, assert_steps, batch, descend, embeddings, sgd
from train.methods import build_method
from train.methods.networks import Predictions
from train.methods.nnclr import NNCLR, NNCLRConfig
from train.model.encoder import EncoderConfig
from train.processes.distributed import World

_SIZE, _TAU = 10, 0.3


def build(queue: int = _SIZE) -> NNCLR:
    torch.manual_seed(0)
    config = NNCLRConfig(hidden=16, out=8, layers=2, predictor_hidden=16, queue=queue, temperature=_TAU)
    method = build_method(config, EncoderConfig(name="resnet18", width=8, stem="cifar"), World())
    assert isinstance(method, NNCLR)
    return method.double()


def nearest(z: torch.Tensor, queue: list[torch.Tensor]) -> torch.Tensor:
    rows = []
    for one in z.detach():
        cosines = [float(one @ row / one.norm()) for row in queue]
        rows.append(queue[cosines.index(max(cosines))])
    return torch.stack(rows)


def contrast(neighbours: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """``L`` of the paper's algorithm 1."""
    logits = F.normalize(neighbours, dim=1) @ F.normalize(p, dim=1).T / _TAU
    return F.cross_entropy(logits, torch.arange(len(p)))


def transcribed(method: NNCLR) -> tuple[list[torch.Tensor], nn.Module]:
    """Algorithm 1, with a list for the queue."""
    f, g = (
        nn.Sequential(copy.deepcopy(method.encoder), copy.deepcopy(method.projector)),
        copy.deepcopy(method.predictor),
    )
    both, queue = nn.Sequential(*f, g), list(method.queue.rows.clone())
    optimizer = sgd(both)
    losses = []
    for step in range(STEPS):
        z = f(torch.cat(batch(step)))
        (z1, z2), (p1, p2) = z.chunk(2), g(z).chunk(2)
        loss = contrast(nearest(z1, queue), p2) / 2 + contrast(nearest(z2, queue), p1) / 2
        losses.append(descend(optimizer, loss))
        queue = (queue + list(F.normalize(z1.detach(), dim=1)))[len(z1) :]
    return losses, both


def test_steps_are_the_papers() -> None:
    method = build()
    losses, both = transcribed(method)
    assert_steps(method, [method.encoder, method.projector, method.predictor], losses, both)


def test_gradient_reaches_z_through_the_prediction_alone() -> None:
    z, p = embeddings(2, 6, 8).requires_grad_(), embeddings(2, 6, 8, seed=1).requires_grad_()
    loss = build().loss(Predictions(z, p, z)).value
    assert torch.autograd.grad(loss, (z, p), allow_unused=True)[0] is None


def test_a_queue_that_has_the_view_itself_finds_it() -> None:
    """Then the loss is that of z itself: SimCLR's positives without the neighbours."""
    method, z, p = build(queue=12), embeddings(2, 6, 8), embeddings(2, 6, 8, seed=1)
    method.queue.push(z.flatten(0, 1), torch.ones(()))
    found = method.loss(Predictions(z, p, z))
    expected = contrast(z[0], p[1]) / 2 + contrast(z[1], p[0]) / 2
    torch.testing.assert_close(found.value, expected)
    assert found.metrics["neighbour_similarity"].item() == pytest.approx(1)


def test_more_views_are_all_ordered_pairs() -> None:
    method, z, p = build(), embeddings(3, 6, 8), embeddings(3, 6, 8, seed=1)
    neighbours = [nearest(one, list(method.queue.rows)) for one in z]
    pairs = [contrast(neighbours[v], p[w]) for v in range(3) for w in range(3) if v != w]
    torch.testing.assert_close(method.loss(Predictions(z, p, z)).value, torch.stack(pairs).mean())


def test_a_collapsed_network_has_the_loss_of_chance() -> None:
    same = torch.ones(2, 6, 8).double()
    assert build().loss(Predictions(same, same, same)).value.item() == pytest.approx(math.log(6))
