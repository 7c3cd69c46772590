"""Other people's files of weights: where in them the encoder is. Its own names are those of torchvision or timm."""

import re
from argparse import Namespace
from itertools import product
from pathlib import PosixPath
from typing import Any

import numpy as np
import torch

# What lies beside the weights and is read as well: arguments, paths, numpy's numbers and arrays by the names of its
# versions 1 and 2. Nothing of this runs code.
HARMLESS: list[Any] = [Namespace, PosixPath, np.dtype, np.ndarray, *(type(np.dtype(kind)) for kind in "?bhilBHILefd")]
HARMLESS += [
    (getattr(np._core.multiarray, name), f"numpy.{module}.multiarray.{name}")  # type: ignore[attr-defined]
    for name, module in product(("scalar", "_reconstruct"), ("core", "_core"))
]
# Where the weights lie in the file; the first that is there, else the file is nothing but weights.
_CONTAINERS = (
    "classy_state_dict.base_model.model.trunk",  # VISSL
    "teacher",  # DINO; the network that its authors evaluate
    "state_dict",  # MoCo, SimSiam, mmselfsup; Lightning, and so solo-learn and lightly
    "model",  # MAE, Barlow Twins, VICReg
)
# What the names of an encoder begin with; the first that some name begins with. Names without it are of other parts.
_PREFIXES = (
    "_feature_blocks.",  # VISSL
    "encoder_q.",  # MoCo v1 and v2
    "base_encoder.",  # MoCo v3
    "online_encoder.net.",  # byol-pytorch
    "backbone.",  # DINO, Barlow Twins, VICReg, solo-learn, lightly, mmselfsup, and ours
    "encoder.",  # SimSiam, old versions of solo-learn
)  # none: torchvision, timm, SwAV, MAE
_HEADS = re.compile(r"projection_head\.|prototypes\.|decoder_|mask_token$")  # SwAV, MAE; classifiers are left to others
# lightly's backbones are nn.Sequential(*list(resnet.children())[:-1]).
_NUMBERED = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def encoder_weights(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of the encoder in a file by the names of torchvision or timm."""
    found = next((inner for place in _CONTAINERS if (inner := _within(content, place))), content)
    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    named = {name.removeprefix("module."): value for name, value in tensors.items()}
    prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in named)), "")
    own = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
    return {_renamed(name): value for name, value in own.items() if not _HEADS.match(name)}


def _within(content: Any, place: str) -> Any:
    for key in place.split("."):
        content = content.get(key) if isinstance(content, dict) else None
    return content


def _renamed(name: str) -> str:
    first, _, rest = name.partition(".")
    return f"{_NUMBERED[first]}.{rest}" if first in _NUMBERED else name
