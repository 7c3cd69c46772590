"""Projection heads: multi-layer perceptrons from a representation h to an embedding z."""

from torch import nn


def mlp(
    num_features: int, hidden: int, out: int, layers: int = 2, *, last_batchnorm: bool = True, last_bias: bool = False
) -> nn.Sequential:
    """``layers`` linear layers, ``hidden`` wide, each but the last followed by BatchNorm and ReLU.

    SimCLR's heads end in a BatchNorm (google-research/simclr); ``last_bias`` is for heads without it.
    """
    modules: list[nn.Module] = []
    for _ in range(layers - 1):
        modules += [nn.Linear(num_features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        num_features = hidden
    modules.append(nn.Linear(num_features, out, bias=last_bias))
    if last_batchnorm:
        modules.append(nn.BatchNorm1d(out))
    return nn.Sequential(*modules)
