from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from pipeline.kernels.photometric_gpu import apply_photometric
from pipeline.plan import BRIGHTNESS, CONTRAST, HUE, SATURATION, ViewPlan
from tests.pipeline.gpu_kernels import DEVICE, expected, noise, plan_for

SIZE = 34  # more than one block of pixels
IMAGES = [noise(SIZE, SIZE, seed) for seed in range(6)]


def as_they_are(images: list[np.ndarray] = IMAGES, **spec: Any) -> ViewPlan:
    """A plan that shows whole images, not resized, and does nothing else."""
    options = {"size": len(images[0]), "kernel": 5, "jitter": 0, "grey": 0, "blur": 0, "flip": 0, **spec}
    return plan_for(images, crop="center", resize=options["size"], **options)


def changed(plan: ViewPlan, images: list[np.ndarray] = IMAGES) -> np.ndarray:
    views = torch.from_numpy(np.stack(images)).to(DEVICE)
    apply_photometric(views, plan)
    return views.cpu().numpy()


@pytest.mark.parametrize("operation", [BRIGHTNESS, CONTRAST, SATURATION])
def test_a_blend_equals_pillow(operation: int) -> None:
    check_jitter([operation], {operation: [0.0, 0.3, 0.999, 1.0, 1.5, 1.8]})


def test_hue_equals_pillow() -> None:
    check_jitter([HUE], {HUE: [-0.5, -0.2, -0.001, 0.0, 0.13, 0.5]})


def test_hue_of_many_colours_equals_pillow() -> None:
    """A grid over all colours with the extremes."""
    values = np.arange(0, 256, 15, dtype=np.uint8)
    colours = np.stack(np.meshgrid(values, values, values), axis=-1).reshape(-1, 3)
    side = int(np.ceil(np.sqrt(len(colours))))
    image = np.resize(colours, (side, side, 3))
    plan = replace(
        as_they_are([image]),
        jitter=np.array([True]),
        order=np.full((1, 4), HUE, np.int8),
        factors=np.full((1, 4), 0.07, np.float32),
    )
    assert_array_equal(changed(plan, [image]), expected([image], plan))


def check_jitter(operations: list[int], factors: dict[int, list[float]]) -> None:
    plan = as_they_are()
    values = plan.factors.copy()
    for operation, column in factors.items():
        values[:, operation] = column
    # The operations that are not tested come with the factors that change nothing.
    rest = [i for i in range(4) if i not in operations]
    values[:, rest] = [0.0 if i == HUE else 1.0 for i in rest]
    order = np.tile(np.array(operations + rest, np.int8), (len(plan), 1))
    plan = replace(plan, jitter=np.ones(len(plan), bool), order=order, factors=values)
    assert_array_equal(changed(plan), expected(IMAGES, plan))


def test_jitter_in_every_sequence_equals_pillow() -> None:
    """Rounded after each operation; contrast about the mean of what precedes it."""
    for seed in range(4):
        plan = as_they_are(jitter=1)
        drawn = plan_for(IMAGES, seed, size=SIZE, jitter=1)
        plan = replace(plan, order=drawn.order, factors=drawn.factors)
        assert len(np.unique(plan.order, axis=0)) > 1
        assert_array_equal(changed(plan), expected(IMAGES, plan))


def test_only_chosen_rows_change() -> None:
    plan = replace(as_they_are(), jitter=np.array([1, 0, 1, 0, 0, 0], bool), grey=np.array([0, 0, 1, 1, 0, 0], bool))
    views = changed(plan)
    assert_array_equal(views, expected(IMAGES, plan))
    assert_array_equal(views[4:], np.stack(IMAGES[4:]))


def test_grey_needs_no_jitter() -> None:
    plan = replace(as_they_are(), grey=np.array([0, 0, 1, 1, 0, 0], bool))
    assert not plan.jitter.any()
    assert_array_equal(changed(plan), expected(IMAGES, plan))


@pytest.mark.parametrize("kernel", [1, 5, 23])
def test_blur_equals_torchvision(kernel: int) -> None:
    """Up to the rounding of sums that lie half-way between two values."""
    sigma = np.array([0.0, 0.1, 0.5, 1.0, 2.0, 9.0], np.float32)
    plan = replace(as_they_are(kernel=kernel), sigma=sigma)
    difference = np.abs(changed(plan).astype(int) - expected(IMAGES, plan))
    assert difference.max() <= 1
    assert difference.mean() < 1e-3


def test_solarize_equals_pillow() -> None:
    plan = replace(as_they_are(), solarize=np.array([1, 0, 1, 1, 0, 1], bool))
    assert_array_equal(changed(plan), expected(IMAGES, plan))
