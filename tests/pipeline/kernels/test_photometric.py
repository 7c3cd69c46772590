"""Every operation against torchvision's on a Pillow image; all are bit-exact but blur."""

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import functional as F

from pipeline.kernels.photometric import adjust, blend, blur, contrast, grey, hue, saturation, solarize

View = NDArray[np.uint8]
Picture = Image.Image
FACTORS = [0.0, 0.2, 0.77, 1.0, 1.31, 1.8, 3.0]


@pytest.fixture(scope="module")
def noise() -> View:
    """(3, 61, 61)"""
    return np.random.default_rng(0).integers(0, 256, (3, 61, 61), dtype=np.uint8)


@pytest.fixture(scope="module")
def all_colours() -> View:
    """(3, 4096, 4096): each of the 2**24 colours once."""
    codes = np.arange(1 << 24, dtype=np.uint32).reshape(4096, 4096)
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255]).astype(np.uint8)


def picture(view: View) -> Picture:
    return Image.fromarray(np.ascontiguousarray(view.transpose(1, 2, 0)))


def planes(image: Picture) -> View:
    return np.asarray(image).transpose(2, 0, 1)


def changed(view: View, operation: Callable[..., None], *arguments: float) -> View:
    result = view.copy()
    operation(result, *arguments)
    return result


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(
    ("ours", "torchvisions"),
    [
        (lambda view, factor: blend(view, 0, factor), F.adjust_brightness),
        (contrast, F.adjust_contrast),
        (saturation, F.adjust_saturation),
    ],
    ids=["brightness", "contrast", "saturation"],
)
def test_factors(
    noise: View, ours: Callable[..., None], torchvisions: Callable[[Picture, float], Picture], factor: float
) -> None:
    assert_array_equal(changed(noise, ours, factor), planes(torchvisions(picture(noise), factor)))


@pytest.mark.parametrize("shift", [0.13, -0.5, 0.003])
def test_hue_of_every_colour(all_colours: View, shift: float) -> None:
    assert_array_equal(changed(all_colours, hue, shift), planes(F.adjust_hue(picture(all_colours), shift)))


def test_saturation_and_grey_of_every_colour(all_colours: View) -> None:
    image = picture(all_colours)
    assert_array_equal(changed(all_colours, saturation, 1.37), planes(F.adjust_saturation(image, 1.37)))
    assert_array_equal(changed(all_colours, grey)[0], np.asarray(F.rgb_to_grayscale(image)))


def test_hue_off_changes_nothing(noise: View) -> None:
    assert_array_equal(changed(noise, hue, 0.0), noise)


def test_contrast_is_about_the_rounded_mean_of_the_image() -> None:
    """Far from 128, and with a mean of exactly one half."""
    view = np.full((3, 4, 4), 30, np.uint8)
    view[:, :2] = 31
    assert_array_equal(changed(view, contrast, 3.0), planes(F.adjust_contrast(picture(view), 3.0)))
    assert changed(view, contrast, 3.0).max() == 31


def test_solarize() -> None:
    view = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (3, 1, 1))
    assert_array_equal(changed(view, solarize), planes(F.solarize(picture(view), 128)))


@pytest.mark.parametrize("kernel", [1, 3, 9, 23])
@pytest.mark.parametrize("sigma", [0.1, 0.2, 0.5, 1.0, 1.4, 2.0])
@pytest.mark.parametrize("size", [23, 61])
def test_blur(noise: View, sigma: float, kernel: int, size: int) -> None:
    view = np.ascontiguousarray(noise[:, :size, :size])
    reference = planes(F.gaussian_blur(picture(view), [kernel, kernel], [sigma, sigma]))
    difference = np.abs(changed(view, blur, sigma, kernel).astype(int) - reference)
    assert difference.max() <= 1
    assert difference.mean() < 0.005


def test_blur_reflects_at_the_border_without_repeating_it() -> None:
    """Columns of one value, rising from the border: its mirror image raises the border."""
    view = np.tile(np.arange(61, dtype=np.uint8) * 4, (3, 61, 1))
    blurred = changed(view, blur, 1.5, 23)
    padded = np.pad(view[0, 0].astype(float), 11, "reflect")
    offsets = np.arange(-11, 12)
    weights = np.exp(-0.5 * (offsets / 1.5) ** 2)
    expected = np.convolve(padded, weights / weights.sum(), "valid")
    assert np.abs(blurred[0, 30] - expected).max() <= 0.52


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_chains_in_every_order(noise: View, order: tuple[int, ...]) -> None:
    factors = np.array([1.5, 0.4, 1.7, -0.17], np.float32)
    operations = F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue
    image = picture(noise)
    for operation in order:
        image = operations[operation](image, float(factors[operation]))
    out = np.empty((61, 61, 3), np.uint8)
    adjust(noise.copy(), True, np.array(order, np.int8), factors, False, 0.0, 23, False, out)
    assert_array_equal(out, np.asarray(image))


@pytest.mark.parametrize("greyed", [False, True])
@pytest.mark.parametrize("solarized", [False, True])
@pytest.mark.parametrize("sigma", [0.0, 1.1])
def test_grey_blur_and_solarize_in_sequence(noise: View, greyed: bool, sigma: float, solarized: bool) -> None:
    image = picture(noise)
    if greyed:
        image = F.rgb_to_grayscale(image, 3)
    if sigma:
        image = F.gaussian_blur(image, [9, 9], [sigma, sigma])
    if solarized:
        image = F.solarize(image, 128)
    out = np.empty((61, 61, 3), np.uint8)
    nothing = np.arange(4, dtype=np.int8), np.ones(4, np.float32)
    adjust(noise.copy(), False, *nothing, greyed, sigma, 9, solarized, out)
    difference = np.abs(out.astype(int) - np.asarray(image))
    assert difference.max() <= 1
    assert difference.mean() < 0.005
