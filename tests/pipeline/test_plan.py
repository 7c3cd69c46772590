"""The distribution of every parameter against torchvision's own `get_params`, and the plan as a pure function."""

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from numpy.typing import NDArray
from scipy.stats import binomtest, chisquare, ks_2samp, kstest
from torchvision.transforms import ColorJitter, GaussianBlur, RandomResizedCrop

from pipeline.plan import BRIGHTNESS, CONTRAST, HUE, SATURATION, Flags, ViewPlan, plan_batch, plan_view
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
        (ViewSpec(scale=(0.5, 1.0)), 100, 200),  # in two of five cases none of ten attempts fits
        (ViewSpec(scale=(0.5, 1.0)), 200, 100),
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


@pytest.mark.parametrize("scale", [0.1, 0.2, 0.31, 0.45])
@pytest.mark.parametrize("ratio", [0.77, 1.3])
def test_sizes_are_torchvisions_given_area_and_ratio(scale: float, ratio: float) -> None:
    spec = ViewSpec(scale=(scale, scale), ratio=(ratio, ratio))
    expected = crops_of_torchvision(spec, 1, 97, 113)[0, 2:]
    assert_array_equal(np.unique(make(spec, 100, 97, 113).edge[:, 2:], axis=0), [expected])


@pytest.mark.parametrize(("height", "width"), [(11, 400), (400, 11), (90, 100), (1, 1)])
def test_the_fallback_is_torchvisions(height: int, width: int) -> None:
    spec = ViewSpec(scale=(1.0, 1.0))
    expected = crops_of_torchvision(spec, 1, height, width)
    assert_array_equal(make(spec, 3, height, width).edge, np.repeat(expected, 3, axis=0))


def test_a_crop_has_at_least_one_pixel() -> None:
    assert (RandomResizedCrop.get_params(torch.empty(3, 1, 1), [0.08, 1], [2, 4]))[2] == 0, "torchvision's has none"
    for ratio, height, width in (((2, 4), 1, 1), ((0.2, 0.4), 1, 1), ((2, 4), 9, 1), ((0.2, 0.4), 1, 9)):
        plan = make(ViewSpec(ratio=ratio), 10, height, width)
        assert (plan.edge[:, 2:] >= 1).all()
        assert (plan.edge[:, :2] + plan.edge[:, 2:] <= (height, width)).all()


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


def test_strength_zero_leaves_as_is() -> None:
    factors = make(ViewSpec(contrast=0, hue=0), 100).factors
    assert_array_equal(np.unique(factors[:, CONTRAST]), [1])
    assert_array_equal(np.unique(factors[:, HUE]), [0])


def test_sigma_follows_torchvision() -> None:
    spec = ViewSpec(blur=1.0, sigma=(0.3, 1.7))
    torch.manual_seed(0)
    theirs = [GaussianBlur.get_params(*spec.sigma) for _ in range(5000)]
    assert ks_2samp(make(spec).sigma, theirs).pvalue > P


# Exactly, and all parameters together: on a square image of which no crop of this spec is too large, torchvision's
# rules are uniform and Bernoulli distributions.
SIDE = 4000
PLAIN = ViewSpec(scale=(0.08, 0.5), contrast=0.4, saturation=0.6, grey=0.2, blur=0.5, sigma=(0.3, 1.7), solarize=0.1)


def plain(n: int, seed: int = 0, epoch: int = 0, view: int = 0, **changes: Any) -> ViewPlan:
    spec, ids, side = PLAIN.model_copy(update=changes), np.arange(n), np.full(n, SIDE)
    return plan_view(spec, seed, view, ids, np.full(n, epoch), side, side)


def uniforms(plan: ViewPlan) -> dict[str, NDArray[np.float64]]:
    """What is uniform in [0, 1) if the plan follows `PLAIN`."""
    top, left, height, width = plan.edge.T.astype(float)
    measured: dict[str, tuple[NDArray[Any], Any]] = {
        "area": (height * width / SIDE**2, PLAIN.scale),
        "ratio": (np.log(width / height), np.log(PLAIN.ratio)),
        "top": ((top + 0.5) / (SIDE - height + 1), (0, 1)),
        "left": ((left + 0.5) / (SIDE - width + 1), (0, 1)),
        "brightness": (plan.factors[:, BRIGHTNESS], (0.2, 1.8)),
        "contrast": (plan.factors[:, CONTRAST], (0.6, 1.4)),
        "saturation": (plan.factors[:, SATURATION], (0.4, 1.6)),
        "hue": (plan.factors[:, HUE], (-0.2, 0.2)),
        "sigma": (plan.sigma[plan.sigma > 0], PLAIN.sigma),
    }
    return {name: (values - low) / (high - low) for name, (values, (low, high)) in measured.items()}


def switches(plan: ViewPlan) -> dict[str, Flags]:
    return {
        "flip": plan.flip,
        "jitter": plan.jitter,
        "grey": plan.grey,
        "blur": plan.sigma > 0,
        "solarize": plan.solarize,
    }


def p_values(plan: ViewPlan) -> dict[str, float]:
    """That each parameter of the plan is drawn as `PLAIN` says."""
    orders = np.unique(plan.order @ (4 ** np.arange(4)), return_counts=True)[1]
    assert len(orders) == math.factorial(4)
    return {
        **{name: kstest(values, "uniform").pvalue for name, values in uniforms(plan).items()},
        **{name: binomtest(int(on.sum()), len(on), getattr(PLAIN, name)).pvalue for name, on in switches(plan).items()},
        "order": chisquare(orders).pvalue,
    }


def test_every_parameter_has_its_exact_distribution() -> None:
    found = p_values(plain(100_000))
    assert min(found.values()) > P, found


@pytest.mark.parametrize(
    ("parameter", "changes"),
    [
        ("area", {"scale": (0.08 * 1.05, 0.5)}),
        ("area", {"scale": (0.08, 0.5 * 0.95)}),
        ("ratio", {"ratio": (0.75 * 1.05, 4 / 3)}),
        ("brightness", {"brightness": 0.8 * 0.95}),
        ("contrast", {"contrast": 0.4 * 1.05}),
        ("saturation", {"saturation": 0.6 * 1.05}),
        ("hue", {"hue": 0.2 * 1.05}),
        ("sigma", {"sigma": (0.3 * 1.05, 1.7)}),
        ("sigma", {"sigma": (0.3, 1.7 * 0.95)}),
        *((name, {name: getattr(PLAIN, name) * 1.05}) for name in ("flip", "jitter", "grey", "blur", "solarize")),
    ],
)
def test_five_percent_beside_it_would_show(parameter: str, changes: dict[str, Any]) -> None:
    found = p_values(plain(100_000, **changes))
    assert [name for name, p in found.items() if p < P] == [parameter]


def features(**options: Any) -> NDArray[np.float64]:
    """Everything that is drawn for each of `N` samples, (17, N): each row a number that has no say in another."""
    plan = plain(N, **options)
    sigma = uniforms(plain(N, **options, blur=1.0))["sigma"]
    places = np.argsort(plan.order, axis=1).T  # of the first three jitter operations in their order
    flags = [on.astype(float) for on in switches(plan).values()]
    return np.stack([*(uniforms(plan) | {"sigma": sigma}).values(), *flags, *places[:3]])


def correlations(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    n = len(first)
    return np.abs(np.corrcoef(first, second)[:n, n:])


def test_nothing_that_is_drawn_tells_of_anything_else() -> None:
    """Of the same view, of other views, passes and seeds, of neighbours in the data set. Shared random words would be
    seen as correlations of 0.3 or more."""
    base, limit = features(), 4.5 / math.sqrt(N)
    within = correlations(base, base) - np.eye(len(base))
    within[-3:, -3:] = 0  # the places in one order do depend on each other
    assert within.max() < limit
    for other in (features(seed=1), features(epoch=1), features(view=1)):
        assert correlations(base, other).max() < limit
    assert correlations(base[:, 1:], base[:, :-1]).max() < limit


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_never_and_always(probability: float) -> None:
    names = ("flip", "jitter", "grey", "blur", "solarize")
    found = switches(make(ViewSpec(**dict.fromkeys(names, probability)), 1000))
    assert_array_equal(np.unique([*found.values()]), [bool(probability)])


def test_parameters_of_a_sample_do_not_depend_on_its_company() -> None:
    rng = np.random.default_rng(0)
    ids, sizes = rng.permutation(1000)[:64], rng.integers(40, 600, (2, 1000))
    everything = plan_view(ViewSpec(), 1, 0, np.arange(1000), np.full(1000, 5), sizes[0], sizes[1])
    some = plan_view(ViewSpec(), 1, 0, ids, np.full(64, 5), sizes[0][ids], sizes[1][ids])
    for field in fields(ViewPlan):
        if field.name != "spec":
            assert_array_equal(getattr(some, field.name), getattr(everything, field.name)[ids])


def test_a_batch_has_a_plan_per_view() -> None:
    n = 6
    plan = plan_batch(preset("dino"), 0, 7, np.arange(n), np.zeros(n, np.int64), np.full(n, 300), np.full(n, 400))
    assert (plan.step, len(plan), len(plan.views)) == (7, n, 10)
    assert [view.spec.size for view in plan.views] == [224] * 2 + [96] * 8
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
