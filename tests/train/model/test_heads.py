import json
from typing import Any

import pytest
import torch
from torch import nn

from train.config import load_config
from train.methods import build_method
from train.model.heads import Norm, mlp
from train.overrides import ConfigError
from train.processes.distributed import World


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


def test_a_list_of_widths_is_what_it_would_be_by_hand() -> None:
    """Of a method's configuration; VISSL's dims [F, 32, 24, 6]."""
    config = load_config(None, ["method.name=barlow", "method.hidden=[32, 24]", "method.out=6", "encoder.width=8"])
    method: Any = build_method(config.method, config.encoder, World())
    layers = nn.Linear(method.encoder.num_features, 32, bias=False), nn.Linear(32, 24, bias=False)
    last = nn.Linear(24, 6, bias=False)
    by_hand = nn.Sequential(layers[0], nn.BatchNorm1d(32), nn.ReLU(), layers[1], nn.BatchNorm1d(24), nn.ReLU(), last)
    by_hand.load_state_dict(method.projector.state_dict())
    h = torch.randn(5, method.encoder.num_features)
    assert torch.equal(method.projector(h), by_hand(h))
    assert load_config(None, [f"method={json.dumps(config.model_dump(mode='json')['method'])}"]).method == config.method
    with pytest.raises(ConfigError, match=r"method\.hidden.*: .*greater than or equal to 1, found 0"):
        load_config(None, ["method.hidden=[32, 0]"])
