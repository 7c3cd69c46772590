import pytest
from pydantic import ValidationError

from pipeline.views import PRESETS, ViewSpec, flatten, preset


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


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name: str) -> None:
    assert flatten(preset(name))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("simclr", [224] * 2),
        ("multicrop-2x160+4x96", [160] * 2 + [96] * 4),
        ("multicrop-2x224+6x96", [224] * 2 + [96] * 6),
        ("dino", [224] * 2 + [96] * 6),
        ("eval", [224]),
    ],
)
def test_views_are_numbered_by_group(name: str, sizes: list[int]) -> None:
    assert [spec.size for spec in flatten(preset(name))] == sizes


def test_byol_is_asymmetric() -> None:
    first, second = flatten(preset("byol"))
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)


def test_overrides_apply_to_all_groups() -> None:
    assert {spec.hue for spec in preset("byol", hue=0.0)} == {0.0}


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match=r"simclr.*found 'simcrl'"):
        preset("simcrl")
