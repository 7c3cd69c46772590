import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import functional as F

from pipeline.kernels.resample import Pixels, as_pixels, find_taps, resample

HEIGHT, WIDTH = 300, 420
IMAGE = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
PICTURE = Image.fromarray(IMAGE)
BILINEAR, BICUBIC = F.InterpolationMode.BILINEAR, F.InterpolationMode.BICUBIC


def ours(
    box: tuple[float, ...],
    size: int,
    flip: bool = False,
    edge: tuple[int, ...] | None = None,
    top: int = 0,
    left: int = 0,
    mode: F.InterpolationMode = BILINEAR,
) -> NDArray[np.uint8]:
    """The view (size, size, 3); the image is given from (``top``, ``left``) on."""
    out = np.empty((3, size, size), np.uint8)
    image, place = pixels(IMAGE[top:, left:]), (np.array(box, float), np.array(edge or box, np.int64))
    resample(image, top, left, *place, flip, mode == BICUBIC, out)
    return out.transpose(1, 2, 0)


def pixels(image: NDArray[np.uint8]) -> Pixels:
    return as_pixels(np.append(image, np.uint8(99)), *image.shape[:2])


def torchvisions(box: tuple[int, ...], size: int, mode: F.InterpolationMode = BILINEAR) -> NDArray[np.uint8]:
    return np.asarray(F.resized_crop(PICTURE, *box, [size, size], mode, antialias=True))


@pytest.mark.parametrize("mode", [BILINEAR, BICUBIC])
@pytest.mark.parametrize("size", [1, 7, 32, 96, 224])
@pytest.mark.parametrize(
    "box",
    [
        (0, 0, HEIGHT, WIDTH),
        (10, 20, 150, 200),
        (11, 23, 224, 224),
        (0, 100, 97, 96),
        (60, 50, 240, 260),
        (5, 7, 290, 120),  # Pillow reduces the height first
        (0, 0, 1, 1),
        (299, 0, 1, WIDTH),
        (0, 419, HEIGHT, 1),
        (100, 100, 33, 35),
    ],
)
def test_every_pixel_is_torchvisions(box: tuple[int, ...], size: int, mode: F.InterpolationMode) -> None:
    assert_array_equal(ours(box, size, mode=mode), torchvisions(box, size, mode))


@pytest.mark.parametrize("mode", [BILINEAR, BICUBIC])
def test_random_crops_are_torchvisions(mode: F.InterpolationMode) -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        height, width = rng.integers(1, HEIGHT + 1), rng.integers(1, WIDTH + 1)
        box = (int(rng.integers(HEIGHT - height + 1)), int(rng.integers(WIDTH - width + 1)), int(height), int(width))
        size = int(rng.integers(1, 250))
        found, expected = ours(box, size, mode=mode), torchvisions(box, size, mode)
        assert_array_equal(found, expected, err_msg=f"{box} to {size}")


@pytest.mark.parametrize("box", [(10, 20, 150, 200), (5, 7, 290, 120)])
def test_flip(box: tuple[int, ...]) -> None:
    expected = np.asarray(F.hflip(Image.fromarray(torchvisions(box, 64))))
    assert_array_equal(ours(box, 64, flip=True), expected)


@pytest.mark.parametrize("box", [(40, 40, 150, 200), (33, 37, 260, 120)])
def test_an_image_that_begins_elsewhere(box: tuple[int, ...]) -> None:
    assert_array_equal(ours(box, 64, top=33, left=21), torchvisions(box, 64))


@pytest.mark.parametrize("mode", [BILINEAR, BICUBIC])
@pytest.mark.parametrize(("resize", "size"), [(256, 224), (100, 80), (400, 224), (64, 64)])
def test_a_centre_crop_reads_beyond_its_box(resize: int, size: int, mode: F.InterpolationMode) -> None:
    expected = np.asarray(F.center_crop(F.resize(PICTURE, [resize], mode, antialias=True), [size]))
    resized = np.array([resize, WIDTH * resize // HEIGHT])
    scale = np.array([HEIGHT, WIDTH]) / resized
    box = *(np.rint((resized - size) / 2) * scale), *(size * scale)
    assert_array_equal(ours(box, size, edge=(0, 0, HEIGHT, WIDTH), mode=mode), expected)


def test_pixels_outside_a_crop_have_no_influence() -> None:
    box = (50, 60, 100, 110)
    before = ours(box, 32)
    image = np.zeros_like(IMAGE)
    image[50:150, 60:170] = IMAGE[50:150, 60:170]
    out = np.empty((3, 32, 32), np.uint8)
    resample(pixels(image), 0, 0, np.array(box, float), np.array(box), False, False, out)
    assert_array_equal(out.transpose(1, 2, 0), before)


@pytest.mark.parametrize(("extent", "size"), [(500, 224), (100, 224), (224, 224), (3, 50), (2000, 96)])
@pytest.mark.parametrize("cubic", [False, True])
def test_weights_sum_to_one_within_the_image(extent: int, size: int, cubic: bool) -> None:
    taps = find_taps(0.0, float(extent), extent, size, False, cubic)
    sums = np.array([taps.weights[i, :n].sum() for i, n in enumerate(taps.length)])
    assert np.abs(sums - 2**22).max() <= taps.length.max()
    assert taps.first.min() >= 0
    assert (taps.first + taps.length).max() <= extent
    mirrored = find_taps(0.0, float(extent), extent, size, True, cubic)
    assert_array_equal(mirrored.first, taps.first[::-1])


def test_words_of_packed_pixels_stay_within_the_memory() -> None:
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    words = pixels(image)
    for channel in range(3):
        assert_array_equal(words >> np.uint32(8 * channel) & np.uint32(255), image[..., channel])
    with pytest.raises(ValueError, match="strides"):
        as_pixels(image.reshape(-1), 2, 4)
