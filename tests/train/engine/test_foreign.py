"""Files in the layouts in which their authors publish them, built with their names."""

import argparse
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from train.engine.checkpoint import CheckpointError, load_pretrained
from train.model.encoder import Encoder, EncoderConfig

Weights = dict[str, Any]
NUMBERS = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}


def named(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


def numbered(weights: Weights) -> Weights:
    parts = {name: name.partition(".") for name in weights}
    return {f"{NUMBERS[first]}.{rest}": weights[name] for name, (first, _, rest) in parts.items()}


def other(*names: str) -> Weights:
    return {name: torch.zeros(3) for name in names}


RESNET: dict[str, Callable[[Weights], Weights]] = {
    "torchvision": lambda w: {**w, **other("fc.weight", "fc.bias")},
    "moco v2": lambda w: {
        "epoch": 800,
        "arch": "resnet50",
        "state_dict": {
            **named("module.encoder_q.", {**w, **other("fc.0.weight", "fc.2.bias")}),
            **named("module.encoder_k.", {name: torch.zeros_like(value) for name, value in w.items()}),
            **other("module.queue", "module.queue_ptr"),
        },
    },
    "moco v3": lambda w: {
        "state_dict": {
            **named("module.base_encoder.", {**w, **other("fc.0.weight", "fc.1.running_mean")}),
            **named("module.momentum_encoder.", other("conv1.weight")),
            **other("module.predictor.0.weight"),
        }
    },
    "swav": lambda w: named("module.", {**w, **other("projection_head.0.weight", "prototypes.weight")}),
    "dino": lambda w: {
        "student": named("module.backbone.", {name: torch.zeros_like(value) for name, value in w.items()}),
        "teacher": {**named("backbone.", w), **other("head.mlp.0.weight", "head.last_layer.weight_v")},
        "args": argparse.Namespace(arch="resnet50"),
    },
    "dino, backbone only": lambda w: w,
    "vissl": lambda w: {
        "classy_state_dict": {
            "base_model": {"model": {"trunk": named("_feature_blocks.", w), "heads": other("0.clf.0.weight")}}
        }
    },
    "lightly": lambda w: {
        "state_dict": {**named("backbone.", numbered(w)), **other("projection_head.layers.0.weight")}
    },
    "solo-learn": lambda w: {
        "state_dict": {
            **named("backbone.", w),
            **other("classifier.weight", "projector.0.weight"),
            **named("momentum_backbone.", other("conv1.weight")),
        },
        "hyper_parameters": {"lr": 0.3},
    },
    "solo-learn, old": lambda w: {"state_dict": {**named("encoder.", w), **other("classifier.weight")}},
    "simsiam": lambda w: {
        "state_dict": {**named("module.encoder.", {**w, **other("fc.0.weight")}), **other("module.predictor.0.weight")}
    },
    "byol-pytorch": lambda w: {
        **named("online_encoder.net.", {**w, **other("fc.weight")}),
        **named("target_encoder.net.", other("conv1.weight")),
        **other("online_predictor.0.weight"),
    },
    "barlow twins": lambda w: {
        "epoch": 1000,
        "model": {**named("module.backbone.", w), **other("module.projector.0.weight", "module.bn.running_mean")},
    },
    "mmselfsup": lambda w: {"meta": {}, "state_dict": {**named("backbone.", w), **other("head.fc.weight")}},
}
VIT: dict[str, Callable[[Weights], Weights]] = {
    "mae": lambda w: {
        "model": {**w, **other("mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight", "decoder_pred.bias")}
    },
    "dino": lambda w: {"teacher": {**named("backbone.", w), **other("head.mlp.0.weight")}},
    "timm": lambda w: {**w, **other("head.weight", "head.bias")},
    "moco v3": lambda w: {"state_dict": named("module.base_encoder.", {**w, **other("head.0.weight")})},
}
LAYOUTS = [
    pytest.param(name, layout, id=f"{name} {title}")
    for name, title, table in (("resnet18", "ResNet", RESNET), ("timm:test_vit", "ViT", VIT))
    for title_, layout in table.items()
    for title in [f"{title} {title_}"]
]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_published_layouts_are_read(name: str, layout: Callable[[Weights], Weights], tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = Encoder(EncoderConfig(name=name)).backbone.state_dict()
    content = layout({key: value for key, value in expected.items() if not key.endswith("num_batches_tracked")})
    torch.save(content, tmp_path / "theirs.pth.tar")
    found = load_pretrained(tmp_path / "theirs.pth.tar", [f"encoder.name={name}"])
    for key, value in expected.items():
        assert torch.equal(found.encoder.backbone.state_dict()[key], value), key
    assert (found.step, found.directory) == (None, tmp_path)


def test_weights_of_a_different_network_are_refused_by_name(tmp_path: Path) -> None:
    weights = Encoder(EncoderConfig(name="resnet34")).backbone.state_dict()
    torch.save({"state_dict": named("module.encoder_q.", weights)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"--checkpoint: .*layer1\.2\.\S+: expected nothing, found \("):
        load_pretrained(tmp_path / "x.pth", ["encoder=resnet18"])


def test_what_lies_beside_the_weights_is_read_or_named(tmp_path: Path) -> None:
    weights, path = Encoder(EncoderConfig(name="resnet18")).backbone.state_dict(), tmp_path / "x.pth"
    beside = {
        "best": np.float64(3),
        "counts": np.arange(3, dtype=np.uint8),
        "root": Path("/data"),
        "old": np.float32(1),
    }
    torch.save({"state_dict": weights, "hyper_parameters": beside}, path)
    load_pretrained(path, ["encoder=resnet18"])
    torch.save({"state_dict": weights, "rate": Fraction(1, 2)}, path)
    with pytest.raises(
        CheckpointError, match=r"x\.pth: cannot be read \(it holds fractions\.Fraction, which may run code"
    ):
        load_pretrained(path, ["encoder=resnet18"])


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {}])
def test_a_file_without_weights_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth"):
        load_pretrained(tmp_path / "x.pth", ["encoder=resnet18"])


def test_settings_of_a_run_that_would_change_its_encoder_are_refused(tmp_path: Path) -> None:
    from tests.train.test_export import trained

    run = trained(tmp_path / "run", "encoder=resnet18", "encoder.width=8")
    with pytest.raises(CheckpointError, match=r"encoder\.width=64: expected settings of data, views or protocols"):
        load_pretrained(run, ["encoder.width=64"])
    assert load_pretrained(run, ["views.size=96"]).config.views[0].size == 96
