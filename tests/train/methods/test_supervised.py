import math

import pytest
import torch
import torch.nn.functional as F

from train.methods import build_method
from train.methods.supervised import Logits, Supervised, SupervisedConfig
from train.model.draws import Draws
from train.model.encoder import EncoderConfig
from train.processes.distributed import World


def supervised(**settings: float) -> Supervised:
    torch.manual_seed(0)
    config = SupervisedConfig.model_validate({"num_classes": 5, **settings})
    method = build_method(config, EncoderConfig(name="resnet18", width=8), World())
    assert isinstance(method, Supervised)
    return method


def test_one_view_gives_logits_near_zero_at_first() -> None:
    method = supervised()
    e = method([torch.randn(4, 3, 32, 32)], Draws(0, 0, torch.arange(4)))
    assert e.logits.shape == (1, 4, 5)
    assert method.loss(e, torch.arange(4)).value.item() == pytest.approx(math.log(5), abs=0.1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_cross_entropy_averaged_over_views(smoothing: float) -> None:
    logits, labels = torch.randn(2, 6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])
    targets = (1 - smoothing) * F.one_hot(labels, 5) + smoothing / 5
    expected = -(targets * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(
        supervised(label_smoothing=smoothing).loss(Logits(logits, logits), labels).value, expected
    )


def test_accuracy_counts_the_largest_logit() -> None:
    labels = torch.tensor([0, 1, 2, 3])
    logits = F.one_hot(torch.tensor([0, 1, 2, 0]), 5).double()[None]
    assert supervised().loss(Logits(logits, logits), labels).metrics["accuracy"].item() == 0.75
