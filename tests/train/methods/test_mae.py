from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from sharding.command import UserError
from train.methods import build_method
from train.methods.mae import MAE, MAEConfig
from train.model.draws import Draws
from train.model.encoder import EncoderConfig
from train.processes.distributed import World

VIT = EncoderConfig(name="timm:vit_tiny_patch16_224", image_size=64)
DRAWS = Draws(3, 5, torch.arange(20, 23))


def build(**fields: Any) -> MAE:
    torch.manual_seed(0)
    config = MAEConfig.model_validate({"width": 32, "depth": 2, "heads": 4, **fields})
    method = build_method(config, VIT, World()).double()
    assert isinstance(method, MAE)
    return method


def images(size: int = 64) -> torch.Tensor:
    return torch.randn(3, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def transcribed(method: MAE, view: torch.Tensor) -> torch.Tensor:
    """Image by image, as section 3 tells it: shuffle, encode the first part of the list, append mask tokens, unshuffle,
    add positions, decode the full list, and compare where patches were masked."""
    vit, decoder = method.encoder.backbone, method.decoder
    total = torch.zeros(()).double()
    for image, order in zip(view, DRAWS.permutation("mask 0", 16), strict=True):
        embedded = vit.patch_embed(image[None]).flatten(1, 2)[0] + vit.pos_embed[0, 1:]
        kept = [int(place) for place in order[:4]]
        tokens = torch.cat([vit.cls_token[0] + vit.pos_embed[0, :1], torch.stack([embedded[k] for k in kept])])
        tokens = decoder.embed(vit.norm(vit.blocks(tokens[None])))[0]
        restored = [tokens[1 + kept.index(n)] if n in kept else decoder.mask[0, 0] for n in range(16)]
        full = torch.cat([tokens[:1], torch.stack(restored) + decoder.positions])
        predictions = decoder.predict(decoder.blocks(full[None]))[0, 1:]
        for n in set(range(16)) - set(kept):
            row, column = divmod(n, 4)
            patch = image[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].permute(1, 2, 0).flatten()
            target = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            total = total + (predictions[n] - target).square().mean() / 12 / len(view)
    return total


def test_value_and_gradient_are_the_papers() -> None:
    method = build()
    trained = [p for p in method.parameters() if p.requires_grad]
    expected, value = transcribed(method, images()), method.loss(method([images()], DRAWS)).value
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    pairs = zip(torch.autograd.grad(value, trained), torch.autograd.grad(expected, trained), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)


def test_it_starts_as_the_authors_does() -> None:
    """models_mae.py: Xavier's bounds for linear layers and patch embedding, N(0, 0.02^2) for tokens, epsilon 1e-6."""
    method = build()
    for layer in (layer for layer in method.modules() if isinstance(layer, nn.Linear)):
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert bound * 0.99 < layer.weight.abs().max() <= bound
        assert not layer.bias.any()
    patches = method.encoder.backbone.patch_embed.proj.weight.flatten(1)
    bound = (6 / sum(patches.shape)) ** 0.5
    assert bound * 0.99 < patches.abs().max() <= bound
    assert method.encoder.backbone.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert {layer.eps for layer in method.modules() if isinstance(layer, nn.LayerNorm)} == {1e-6}


def test_the_encoder_does_not_see_what_is_masked() -> None:
    method, view = build(), images()
    before = method([view], DRAWS)
    for image, order in zip(view, DRAWS.permutation("mask 0", 16), strict=True):
        for n in order[4:].tolist():
            row, column = divmod(n, 4)
            image[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = torch.rand(3, 16, 16)
    after = method([view], DRAWS)
    assert torch.equal(after.predictions, before.predictions)
    assert not torch.isclose(after.targets, before.targets).all(-1).any()


def test_masks_are_uniform() -> None:
    """Over many samples each patch, and each pair of patches, is as often seen as any other."""
    seen = torch.zeros(20000, 16)
    seen.scatter_(1, Draws(0, 0, torch.arange(20000)).permutation("mask 0", 16)[:, :4], 1.0)
    patches, pairs = seen.mean(0), (seen.T @ seen / len(seen))[~torch.eye(16, dtype=torch.bool)]
    assert (patches - 4 / 16).abs().max() < 5 * (0.25 * 0.75 / 20000) ** 0.5
    assert (pairs - 4 * 3 / (16 * 15)).abs().max() < 5 * (0.05 * 0.95 / 20000) ** 0.5


def test_views_of_an_image_have_masks_of_their_own() -> None:
    first, second = build()([images(), images()], DRAWS).targets
    assert not torch.equal(first, second)


def test_pixels_as_they_are() -> None:
    """Targets are values of the image."""
    targets = build(standardise=False)([images()], DRAWS).targets
    assert targets.shape == (1, 3, 12, 16 * 16 * 3)
    assert torch.isin(targets, images()).all()


def test_exported_is_the_encoder_of_whole_images() -> None:
    method: Any = build().eval()
    vit = method.exported().backbone
    torch.testing.assert_close(method.exported()(images()), vit.forward_features(images())[:, 0])
    assert not vit.pos_embed.requires_grad


def test_views_of_the_wrong_size_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"expected views of 64 px.*found 32; set encoder.image_size=32 or views.size=64"
    ):
        build()([images(32)], DRAWS)


def test_only_a_vit_can_leave_out_patches() -> None:
    with pytest.raises(UserError, match=r"expected a ViT as encoder.name.* found ScaledResNet"):
        build_method(MAEConfig(), EncoderConfig(name="resnet18"), World())


def test_heads_divide_the_width() -> None:
    with pytest.raises(ValidationError, match="heads: expected a divisor of the decoder's width 32, found 3"):
        MAEConfig(width=32, heads=3)
