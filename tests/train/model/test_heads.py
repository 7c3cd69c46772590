import pytest
import torch
from torch import nn

from train.model.heads import Norm, mlp


def kinds(head: nn.Sequential) -> list[str]:
    return [type(module).__name__ for module in head]


def test_simclrs_projector_ends_in_batchnorm() -> None:
    assert kinds(mlp(8, 16, 4, 2)) == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]


def test_byols_ends_in_a_linear_layer_with_bias() -> None:
    head = mlp(8, 16, 4, 2, last_norm=False)
    assert kinds(head) == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert head[0].bias is None
    assert head[3].bias is not None


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_widths(norm: Norm, layers: int) -> None:
    head = mlp(8, 16, 4, layers, norm=norm, activation=nn.GELU)
    assert head(torch.randn(5, 8)).shape == (5, 4)
    assert [m.weight.shape[0] for m in head if isinstance(m, nn.Linear)] == [16] * (layers - 1) + [4]
    assert sum(isinstance(m, nn.GELU) for m in head) == layers - 1
