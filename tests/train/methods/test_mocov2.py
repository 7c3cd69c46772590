import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.train.methods.steps import STEPS, assert_steps, batch, descend, embeddings, sgd
from train.engine.step import TrainStep
from train.losses.contrastive import contrast_accuracy, queue_logits
from train.methods import build_method
from train.methods.mocov2 import MoCoV2, MoCoV2Config
from train.model.draws import Draws
from train.model.encoder import EncoderConfig
from train.processes.distributed import World

_SIZE, _MOMENTUM, _TAU = 10, 0.7, 0.3


def build() -> MoCoV2:
    torch.manual_seed(0)
    config = MoCoV2Config(hidden=16, out=8, queue=_SIZE, momentum=_MOMENTUM, temperature=_TAU)
    method = build_method(config, EncoderConfig(name="resnet18", width=8, stem="cifar"), World())
    assert isinstance(method, MoCoV2)
    return method.double()


def transcribed(method: MoCoV2) -> tuple[list[torch.Tensor], nn.Module, list[torch.Tensor]]:
    """Algorithm 1 of MoCo, with a list for the queue and the teacher moved before it is used."""
    f_q = nn.Sequential(copy.deepcopy(method.encoder), copy.deepcopy(method.projector))
    f_k, queue = copy.deepcopy(f_q), list(method.queue.rows.clone())
    optimizer = sgd(f_q)
    losses = []
    for step in range(STEPS):
        with torch.no_grad():
            for k, q in zip(f_k.parameters(), f_q.parameters(), strict=True):
                k.copy_(_MOMENTUM * k + (1 - _MOMENTUM) * q)
            keys = F.normalize(f_k(batch(step)[1]), dim=1)
        queries = F.normalize(f_q(batch(step)[0]), dim=1)
        loss = torch.zeros(())
        for q, k in zip(queries, keys, strict=True):
            logits = torch.stack([q @ k, *[q @ n for n in queue]]) / _TAU
            loss = loss + F.cross_entropy(logits[None], torch.tensor([0])) / len(queries)
        losses.append(descend(optimizer, loss))
        queue = (queue + list(keys))[len(keys) :]
    return losses, f_q, queue


def test_steps_are_the_papers() -> None:
    method = build()
    losses, f_q, queue = transcribed(method)
    assert_steps(method, [method.encoder, method.projector], losses, f_q)
    rows = method.queue.rows.roll(-int(method.queue.position), 0)
    torch.testing.assert_close(rows, torch.stack(queue), rtol=1e-8, atol=1e-10)


def test_pieces_keys_enter_the_queue_in_the_order_of_the_batch() -> None:
    queues = []
    for pieces in (1, 3):
        method = build().eval()  # BatchNorm does not tell pieces from batches
        train = TrainStep(method, method, sgd(method), torch.float64, micro_batch_size=6 // pieces)
        train(batch(0), Draws(0, 0, torch.arange(6)), 0.05, 0.1)
        queues.append(method.queue.rows)
    torch.testing.assert_close(queues[0], queues[1], rtol=1e-12, atol=1e-12)


def loss_of(q: torch.Tensor, k: torch.Tensor, queue: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = queue_logits(q, k, queue, temperature)
    return (logits.logsumexp(1) - logits[:, 0]).mean()


def test_known_values() -> None:
    q, queue = F.normalize(embeddings(6, 8), dim=-1), torch.zeros(7, 8).double()
    assert loss_of(q, 3 * q, queue, 0.5).item() == pytest.approx(math.log1p(7 * math.exp(-1 / 0.5)))
    assert loss_of(q, q, q[:1].expand(7, 8), 1.0).item() <= math.log(8)


def test_a_collapsed_network_has_the_loss_of_chance() -> None:
    same = F.normalize(torch.ones(6, 8).double(), dim=-1)
    assert loss_of(same, same, same[:1].expand(10, 8), 0.2).item() == pytest.approx(math.log(11))


def test_the_log_says_how_often_the_key_is_before_the_queues() -> None:
    positives = torch.tensor([0.9, 0.5, 0.5, 0.5])
    others = torch.tensor([[0.8] * 6, [0.6] * 4 + [0.1] * 2, [0.6] * 5 + [0.1], [0.5] * 6])
    accuracy = contrast_accuracy(positives, others)
    assert accuracy["contrast_top1_percent"] == 25, "the first alone"
    assert accuracy["contrast_top5_percent"] == 50, "four are before the second; equal ones count against the last"
