"""Projection heads: multi-layer perceptrons from a representation h to an embedding z."""

from torch import nn


def mlp(num_features: int, hidden: int, out: int, layers: int = 2) -> nn.Sequential:
    """``layers`` linear layers, ``hidden`` wide, each followed by BatchNorm and all but the last by ReLU.

    The BatchNorm at the end is SimCLR's (google-research/simclr). Two details of theirs are not here: that BatchNorm
    has no bias there (``center=False``), and linear layers start at N(0, 0.01) where these start as torch's do.
    """
    modules: list[nn.Module] = []
    for _ in range(layers - 1):
        modules += [nn.Linear(num_features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        num_features = hidden
    modules += [nn.Linear(num_features, out, bias=False), nn.BatchNorm1d(out)]
    return nn.Sequential(*modules)
