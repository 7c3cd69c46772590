"""The distribution of every parameter against torchvision's own `get_params`, and the plan as a pure function."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from numpy.typing import NDArray
from scipy.stats import chisquare, ks_2samp, kstest
from torchvision.transforms import ColorJitter, GaussianBlur, RandomResizedCrop

from pipeline.plan import CONTRAST, HUE, SATURATION, ViewPlan, plan_batch, plan_view
from pipeline.views import ViewSpec, preset

N = 20_000
# Tests are deterministic, so a threshold is a choice of how unlikely a draw may be; there are some forty of them.
P = 1e-3


def make(spec: ViewSpec, n: int = N, height: int = 375, width: int = 500, seed: int = 0) -> ViewPlan:
    ids = np.arange(n)
    return plan_view(spec, seed, 0, ids, np.zeros(n, np.int64), np.full(n, height), np.full(n, width))


def crops_of_torchvision(spec: ViewSpec, n: int, height: int, width: int) -> NDArray[np.int64]:
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    return np.array([RandomResizedCrop.get_params(image, list(spec.scale), list(spec.ratio)) for _ in range(n)])


@pytest.mark.parametrize(
    ("spec", "height", "width"),
    [
        (ViewSpec(), 375, 500),
        (ViewSpec(), 500, 333),
        (ViewSpec(scale=(0.05, 0.14)), 375, 500),
        (ViewSpec(scale=(0.6, 1.0)), 100, 400),  # often none of ten attempts fits
        (ViewSpec(scale=(0.9, 1.0)), 400, 100),
        (ViewSpec(size=32, blur=0), 32, 32),
    ],
)
def test_crops_follow_torchvision(spec: ViewSpec, height: int, width: int) -> None:
    ours = make(spec, height=height, width=width).edge
    theirs = crops_of_torchvision(spec, 5000, height, width)
    inside = (ours[:, :2] >= 0) & (ours[:, 2:] > 0) & (ours[:, :2] + ours[:, 2:] <= (height, width))
    assert inside.all()
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > P
    area, ratio = (f(ours[:, 2].astype(float), ours[:, 3]) for f in (np.multiply, np.divide))
    assert ks_2samp(area, theirs[:, 2] * theirs[:, 3]).pvalue > P
    assert ks_2samp(ratio, theirs[:, 2] / theirs[:, 3]).pvalue > P


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (1, 1)])
def test_the_fallback_is_torchvisions(height: int, width: int) -> None:
    spec = ViewSpec(scale=(1.0, 1.0))
    expected = crops_of_torchvision(spec, 1, height, width)
    assert_array_equal(make(spec, 3, height, width).edge, np.repeat(expected, 3, axis=0))


def test_corners_are_uniform_given_the_size() -> None:
    edge = make(ViewSpec(scale=(0.25, 0.25), ratio=(1.0, 1.0)), height=100, width=100).edge
    assert_array_equal(np.unique(edge[:, 2:]), [50])
    for column in (0, 1):
        assert chisquare(np.bincount(edge[:, column], minlength=51)).pvalue > P


def test_factors_follow_torchvision() -> None:
    spec = ViewSpec(brightness=0.8, contrast=0.4, saturation=1.5, hue=0.2)
    torch.manual_seed(0)
    jitter = ColorJitter(spec.brightness, spec.contrast, spec.saturation, spec.hue)
    bounds = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    theirs = np.array([ColorJitter.get_params(*bounds)[1:] for _ in range(5000)], dtype=float)
    ours = make(spec).factors
    for operation in range(4):
        assert ks_2samp(ours[:, operation], theirs[:, operation]).pvalue > P
    assert ours[:, SATURATION].min() >= 0
    assert np.abs(np.corrcoef(ours.T) - np.eye(4)).max() < 0.03


def test_strength_zero_leaves_as_is() -> None:
    factors = make(ViewSpec(contrast=0, hue=0), 100).factors
    assert_array_equal(np.unique(factors[:, CONTRAST]), [1])
    assert_array_equal(np.unique(factors[:, HUE]), [0])


def test_all_24_orders_of_jitter_are_equally_likely() -> None:
    order = make(ViewSpec()).order
    assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(4), (N, 1)))
    numbers = order @ (4 ** np.arange(4))
    counts = np.unique(numbers, return_counts=True)[1]
    assert len(counts) == math.factorial(4)
    assert chisquare(counts).pvalue > P


def test_sigma_follows_torchvision() -> None:
    spec = ViewSpec(blur=1.0, sigma=(0.3, 1.7))
    torch.manual_seed(0)
    theirs = [GaussianBlur.get_params(*spec.sigma) for _ in range(5000)]
    assert ks_2samp(make(spec).sigma, theirs).pvalue > P


def test_switches_have_their_probabilities_and_are_independent() -> None:
    spec = ViewSpec(flip=0.5, jitter=0.8, grey=0.2, blur=0.3, solarize=0.1)
    plan = make(spec)
    switches = np.stack([plan.flip, plan.jitter, plan.grey, plan.sigma > 0, plan.solarize])
    wanted = np.array([0.5, 0.8, 0.2, 0.3, 0.1])
    deviations = (switches.mean(axis=1) - wanted) / np.sqrt(wanted * (1 - wanted) / N)
    assert np.abs(deviations).max() < 3.3
    assert np.abs(np.corrcoef(switches) - np.eye(5)).max() < 0.03


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_never_and_always(probability: float) -> None:
    names = ("flip", "jitter", "grey", "blur", "solarize")
    plan = make(ViewSpec(**dict.fromkeys(names, probability)), 1000)
    switches = np.stack([plan.flip, plan.jitter, plan.grey, plan.sigma > 0, plan.solarize])
    assert_array_equal(np.unique(switches), [bool(probability)])


def test_parameters_of_a_sample_do_not_depend_on_its_company() -> None:
    rng = np.random.default_rng(0)
    ids, sizes = rng.permutation(1000)[:64], rng.integers(40, 600, (2, 1000))
    everything = plan_view(ViewSpec(), 1, 0, np.arange(1000), np.full(1000, 5), sizes[0], sizes[1])
    some = plan_view(ViewSpec(), 1, 0, ids, np.full(64, 5), sizes[0][ids], sizes[1][ids])
    for field in fields(ViewPlan):
        if field.name != "spec":
            assert_array_equal(getattr(some, field.name), getattr(everything, field.name)[ids])


def test_seed_pass_and_view_draw_anew() -> None:
    ids, sizes = np.arange(2000), np.full(2000, 400)

    def tops(seed: int, epoch: int, view: int) -> NDArray[np.int64]:
        return plan_view(ViewSpec(), seed, view, ids, np.full(2000, epoch), sizes, sizes).edge[:, 0]

    base = tops(0, 0, 0)
    for other in (tops(1, 0, 0), tops(0, 1, 0), tops(0, 0, 1)):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.08


def test_a_batch_has_a_plan_per_view() -> None:
    n = 6
    plan = plan_batch(preset("dino"), 0, 7, np.arange(n), np.zeros(n, np.int64), np.full(n, 300), np.full(n, 400))
    assert (plan.step, len(plan), len(plan.views)) == (7, n, 8)
    assert [view.spec.size for view in plan.views] == [224] * 2 + [96] * 6
    assert not np.array_equal(plan.views[2].edge, plan.views[3].edge)
    assert_array_equal(plan.views[2].take(slice(2, 4)).edge, plan.views[2].edge[2:4])


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (256, 256), (97, 1000)])
def test_centre_crop_shows_the_middle_at_the_scale_of_the_resize(height: int, width: int) -> None:
    plan = make(preset("eval")[0], 2, height, width)
    top, left, box_height, box_width = plan.box[0]
    assert abs(top + box_height / 2 - height / 2) <= height / 256
    assert abs(left + box_width / 2 - width / 2) <= width / 256
    assert box_height == pytest.approx(min(height, width) * 224 / 256, rel=0.01)
    assert_array_equal(plan.edge[0], [0, 0, height, width])


def test_uniform_draws_pass_kolmogorov_smirnov() -> None:
    low, high = 0.2, 1.8
    brightness = make(ViewSpec(brightness=0.8)).factors[:, 0]
    assert kstest(brightness, "uniform", (low, high - low)).pvalue > P
