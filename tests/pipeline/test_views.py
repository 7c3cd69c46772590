import pytest
import torch
from pydantic import ValidationError

from pipeline.transfer import normalize
from pipeline.views import PRESETS, ViewSpec, flatten, in_levels, parse, preset


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"scale": (0.5, 1.5)}, "at most 1"),
        ({"ratio": (0, 1)}, "ratio"),
        ({"sigma": (0, 1)}, "sigma"),
        ({"kernel": 4}, "odd"),
        ({"size": 8}, "kernel"),
        ({"crop": "center", "resize": 100}, "resize"),
        ({"crop": "middle"}, "crop"),
        ({"flip": 1.5}, "flip"),
        ({"hue": 0.6}, "hue"),
        ({"brightness": -1}, "brightness"),
        ({"count": 0}, "count"),
        ({"colour": 1}, "colour"),
    ],
)
def test_refuses_impossible_views(changes: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ViewSpec(**changes)


def test_a_small_view_without_blur_needs_no_kernel() -> None:
    assert ViewSpec(size=8, blur=0).size == 8


def test_views_are_numbered_by_group() -> None:
    specs = ViewSpec(count=2), ViewSpec(count=3, size=96)
    assert [spec.size for spec in flatten(specs)] == [224] * 2 + [96] * 3


# The published values, in full, so that no default moves unnoticed.
SIMCLR = {
    "count": 2,
    "size": 224,
    "crop": "random",
    "scale": (0.08, 1.0),
    "ratio": (3 / 4, 4 / 3),
    "resize": 256,
    "interpolation": "bilinear",
    "flip": 0.5,
    "jitter": 0.8,
    "brightness": 0.8,
    "contrast": 0.8,
    "saturation": 0.8,
    "hue": 0.2,
    "grey": 0.2,
    "blur": 0.5,
    "sigma": (0.1, 2.0),
    "kernel": 23,
    "solarize": 0.0,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
HALF_JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
BYOL = {**HALF_JITTER, "saturation": 0.2, "interpolation": "bicubic"}
GLOBAL, LOCAL = {"count": 1, "scale": (0.4, 1.0)}, {"count": 8, "size": 96, "scale": (0.05, 0.4)}
NO_AUGMENTATION = {"flip": 0, "jitter": 0, "grey": 0, "blur": 0}


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("simclr", [{}]),
        ("simclr-cifar", [{"size": 32, "blur": 0.0, **HALF_JITTER, **CIFAR}]),
        (
            "byol",
            [{"count": 1, "blur": 1.0, **BYOL}, {"count": 1, "blur": 0.1, "solarize": 0.2, **BYOL}],
        ),
        ("vicreg", [{"solarize": 0.1, **BYOL}]),
        ("supervised", [{"count": 1, **NO_AUGMENTATION, "flip": 0.5}]),
        ("mocov2", [{"scale": (0.2, 1.0), **HALF_JITTER}]),
        (
            "mocov3",
            [
                {"count": 1, "scale": (0.2, 1.0), **BYOL, "interpolation": "bilinear", "blur": 1.0},
                {"count": 1, "scale": (0.2, 1.0), **BYOL, "interpolation": "bilinear", "blur": 0.1, "solarize": 0.2},
            ],
        ),
        ("mae", [{"count": 1, "scale": (0.2, 1.0), **NO_AUGMENTATION, "flip": 0.5, "interpolation": "bicubic"}]),
        (
            "lejepa",
            [
                {"scale": (0.3, 1.0), "solarize": 0.2, **BYOL},
                {"count": 6, "size": 98, "scale": (0.05, 0.3), "solarize": 0.2, **BYOL},
            ],
        ),
        (
            "visreg",
            [
                {"count": 4, "scale": (0.3, 1.0), "solarize": 0.1, "kernel": 9, **BYOL},
                {"count": 6, "size": 96, "scale": (0.05, 0.3), "solarize": 0.1, "kernel": 9, **BYOL},
            ],
        ),
        (
            "multicrop-2x160+4x96",
            [{"size": 160, "scale": (0.14, 1.0)}, {"count": 4, "size": 96, "scale": (0.05, 0.14)}],
        ),
        ("multicrop-2x224+6x96", [{"scale": (0.14, 1.0)}, {"count": 6, "size": 96, "scale": (0.05, 0.14)}]),
        (
            "dino",
            [
                {**GLOBAL, **BYOL, "blur": 1.0},
                {**GLOBAL, **BYOL, "blur": 0.1, "solarize": 0.2},
                {**LOCAL, **BYOL},
            ],
        ),
        ("eval", [{"count": 1, "crop": "center", **NO_AUGMENTATION}]),
    ],
)
def test_presets_have_the_published_values(name: str, groups: list[dict]) -> None:
    assert [spec.model_dump() for spec in preset(name)] == [SIMCLR | group for group in groups]


def test_overrides_apply_to_all_groups() -> None:
    assert {spec.hue for spec in preset("byol", hue=0.0)} == {0.0}


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"simclr.*found 'simcrl'"):
        preset("simcrl")


def test_views_written_before_there_was_an_interpolation_are_bilinear() -> None:
    (view,) = parse([{"count": 2, "size": 32, "kernel": 5}])
    assert view.interpolation == "bilinear"
    with pytest.raises(ValueError, match=r"views\.0\.interpolation: .*'bicubic', found 'cubic'"):
        parse([{"interpolation": "cubic"}])


def test_methods_that_were_published_with_bicubic_crops_have_them() -> None:
    bicubic = {name for name in PRESETS if any(view.is_cubic for view in preset(name))}
    assert bicubic == {"byol", "byol-cifar", "vicreg", "vicreg-cifar", "lejepa", "visreg", "dino", "mae"}


def test_in_levels_leaves_pixels_as_they_are() -> None:
    (spec,) = in_levels(preset("mae"))
    levels = torch.arange(256, dtype=torch.uint8)[None, None, :, None].expand(1, 1, 256, 3)
    normal = normalize(levels, spec.mean, spec.std, torch.float32)
    assert torch.equal(normal[0, 0, 0], torch.arange(256.0))
    assert spec.scale == (0.2, 1.0)
