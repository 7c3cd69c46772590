import io

import datasets
import numpy as np
import pytest
from PIL import Image

from sharding import demo


def encoded(split: str = "train", **options: int) -> list[bytes]:
    images = demo.load_demo(split, **options).cast_column("image", datasets.Image(decode=False))
    return [row["bytes"] for row in images["image"]]


def test_the_dataset_has_the_features_of_imagenet_and_balanced_labels() -> None:
    images = demo.load_demo(num_images=20)
    assert isinstance(images.features["image"], datasets.Image)
    assert images.features["label"].names == list(demo.CLASSES)
    assert images["label"] == [*range(10), *range(10)]
    assert images[0]["image"].size == (demo.SIZE, demo.SIZE)
    assert images[0]["image"].mode == "RGB"


def test_bytes_are_complete_jpegs_of_the_drawn_pictures() -> None:
    for i, data in enumerate(encoded(num_images=10)):
        image = Image.open(io.BytesIO(data))
        assert image.format == "JPEG"
        difference = np.abs(np.asarray(image, np.float32) - 255 * demo.draw("train", 0, i))
        assert difference.mean() < 12


def test_an_image_depends_on_seed_split_and_number_only() -> None:
    images = encoded(num_images=12)
    assert encoded(num_images=12) == images
    assert encoded(num_images=5) == images[:5]
    for other in (encoded(num_images=12, seed=1), encoded("test", num_images=12)):
        assert not set(other) & set(images)


def test_images_of_a_class_differ_in_place_and_colour() -> None:
    pictures = np.stack([demo.draw("train", 0, 10 * i) for i in range(16)])
    assert pictures.std(0).mean() > 0.15  # at the same pixel, over images
    assert pictures.mean((1, 2)).std(0).min() > 0.08  # mean colour


@pytest.mark.parametrize("name", demo.CLASSES)
def test_shapes_are_inside_the_unit_square_and_fill_a_part_of_it(name: str) -> None:
    v, u = np.mgrid[2:-2:81j, -2:2:81j].astype(np.float32)
    inside = demo.CLASSES[name](u, v, np.hypot(u, v), np.arctan2(u, v))[0] < 0
    assert not inside[(np.abs(u) > 1.2) | (np.abs(v) > 1.2)].any()
    assert 0.1 < inside.sum() * 0.05**2 / 4 < 0.7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "validation"}, "split train or test, found 'validation'"),
        ({"num_images": 0}, "num_images >= 1"),
        ({"seed": -1}, "seed >= 0"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo.load_demo(**arguments)  # type: ignore[arg-type]
