import math

import pytest
import torch

from train.losses.contrastive import nt_xent, sup_con
from train.methods import build_method
from train.methods.networks import Embeddings
from train.methods.supcon import SupConConfig
from train.model.draws import Draws
from train.model.encoder import EncoderConfig
from train.processes.distributed import World

LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


def embeddings(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def transcribed(z: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """Equation 2 of the paper, sum by sum."""
    rows = [z[v, i] / z[v, i].norm() for v in range(z.shape[0]) for i in range(z.shape[1])]
    classes = [int(c) for c in labels] * z.shape[0]
    total = torch.zeros((), dtype=z.dtype)
    for i in range(len(rows)):
        others = [a for a in range(len(rows)) if a != i]
        positives = [p for p in others if classes[p] == classes[i]]
        denominator = torch.stack([(rows[i] @ rows[a] / temperature).exp() for a in others]).sum()
        logs = [((rows[i] @ rows[p] / temperature).exp() / denominator).log() for p in positives]
        total = total - torch.stack(logs).sum() / len(positives)
    return total / len(rows)


@pytest.mark.parametrize("num_views", [2, 3])
def test_value_and_gradient_are_the_papers(num_views: int) -> None:
    z = embeddings(num_views, 6, 5).requires_grad_()
    found, expected = sup_con(z, LABELS, z, LABELS, 0, 0.2), transcribed(z, LABELS, 0.2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z))


def test_parts_of_the_batch_average_to_the_whole() -> None:
    z = embeddings(2, 6, 5)
    parts = [sup_con(z[:, i : i + 2], LABELS[i : i + 2], z, LABELS, i, 0.2) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), sup_con(z, LABELS, z, LABELS, 0, 0.2))


@pytest.mark.parametrize("num_views", [2, 3])
def test_with_a_class_for_each_image_it_is_nt_xent(num_views: int) -> None:
    """Claim: SimCLR's loss is SupCon's where no two images share a class."""
    z, labels = embeddings(num_views, 6, 5), torch.arange(6)
    torch.testing.assert_close(sup_con(z, labels, z, labels, 0, 0.2), nt_xent(z, z, 0, 0.2))


def test_known_values_at_collapse_and_for_separate_classes() -> None:
    z = torch.ones(2, 6, 4, dtype=torch.float64)
    assert sup_con(z, LABELS, z, LABELS, 0, 0.1).item() == pytest.approx(math.log(11))
    z = torch.eye(3, dtype=torch.float64)[LABELS].expand(2, 6, 3)
    assert sup_con(z, LABELS, z, LABELS, 0, 0.01).item() == pytest.approx(
        sum(math.log(2 * int((c == LABELS).sum()) - 1) for c in LABELS) / 6
    )


def test_method_takes_labels_and_has_no_batchnorm_in_its_projector() -> None:
    method = build_method(SupConConfig(hidden=16, out=8), EncoderConfig(name="resnet18", width=8), World())
    e = method([torch.randn(6, 3, 32, 32) for _ in range(2)], Draws(0, 0, torch.arange(6)))
    assert isinstance(e, Embeddings)
    torch.testing.assert_close(method.loss(e, LABELS).value, sup_con(e.z, LABELS, e.z, LABELS, 0, 0.1))
    layers = [type(layer).__name__ for layer in method.projector]  # type: ignore[union-attr]
    assert layers == ["Linear", "ReLU", "Linear"]
