from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from pipeline.backends import BackendContext, DamagedSampleError
from pipeline.backends.torchvision import build, decode
from pipeline.plan import BatchPlan, ViewPlan, plan_samples
from pipeline.reading.reader import Reader
from pipeline.views import ViewSpec, preset
from sharding.manifest import ShardSet
from tests.pipeline.reference import apply

SPECS = ViewSpec(size=40, kernel=9), ViewSpec(size=32, kernel=5, solarize=0.5)


def plan_of(shards: ShardSet, ids: list[int] | range) -> BatchPlan:
    rows = np.array(ids)
    return plan_samples(shards, SPECS, 0, 0, rows, np.zeros_like(rows))


def one_view(spec: ViewSpec, image: Image.Image, **changes: object) -> ViewPlan:
    """The plan of one plain view, with changes."""
    height, width = image.height, image.width
    edge = np.array([[0, 0, height, width]])
    plan: dict = {
        "spec": spec,
        "box": edge.astype(float),
        "edge": edge,
        "order": np.arange(4, dtype=np.int8)[None],
        "factors": np.array([[1.3, 0.7, 1.6, 0.1]], np.float32),
        "sigma": np.zeros(1, np.float32),
        **dict.fromkeys(("flip", "jitter", "grey", "solarize"), np.zeros(1, bool)),
    }
    return ViewPlan(**plan | {name: np.array([value]) for name, value in changes.items()})


def test_views_and_damage(damage: Callable[[int], ShardSet]) -> None:
    shards = damage(3)
    reader = Reader(shards)
    backend = build(BackendContext(reader, 16, 2, torch.device("cpu")))
    sound = plan_of(shards, [5, 0, 91, 17, 5])
    batch, spoilt = backend.submit(sound), backend.submit(plan_of(shards, range(6)))
    for view, view_plan in zip(batch.result(), sound.views, strict=True):
        for row, sample in enumerate(sound.ids):
            expected = apply(decode(reader.read(int(sample))), view_plan, row)
            assert np.array_equal(view[row].numpy(), np.asarray(expected))
    with pytest.raises(DamagedSampleError) as raised:
        spoilt.result()
    assert list(raised.value.reasons) == [3]
    stats = backend.stats()
    assert min(stats.decode_seconds, stats.geometry_seconds, stats.photometric_seconds) > 0
    backend.close()


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


@pytest.fixture
def resized(image: Image.Image) -> Image.Image:
    return F.resize(image, [32, 32])


@pytest.mark.parametrize(
    ("changes", "operation"),
    [
        ({}, lambda view: view),
        ({"flip": True}, F.hflip),
        ({"grey": True}, lambda view: F.rgb_to_grayscale(view, 3)),
        ({"solarize": True}, lambda view: F.solarize(view, 128)),
        ({"sigma": 1.5}, lambda view: F.gaussian_blur(view, [9, 9], [1.5, 1.5])),
    ],
)
def test_single_operations(
    image: Image.Image, resized: Image.Image, changes: dict, operation: Callable[[Image.Image], Image.Image]
) -> None:
    view = apply(image, one_view(ViewSpec(size=32, kernel=9), image, **changes), 0)
    assert view.tobytes() == operation(resized).tobytes()


def test_jitter_in_the_planned_order(image: Image.Image, resized: Image.Image) -> None:
    order, factors = [2, 3, 0, 1], np.array([1.3, 0.7, 1.6, 0.1], np.float32)
    operations = F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue
    for operation in order:
        resized = operations[operation](resized, float(factors[operation]))
    view = apply(image, one_view(ViewSpec(size=32, kernel=9), image, jitter=True, order=order, factors=factors), 0)
    assert view.tobytes() == resized.tobytes()


def test_hue_is_left_out_when_it_is_off(image: Image.Image, resized: Image.Image) -> None:
    """As `ColorJitter` does; a turn by nothing is not exact in 8-bit HSV."""
    assert F.adjust_hue(resized, 0.0).tobytes() != resized.tobytes()
    view = apply(image, one_view(ViewSpec(size=32, kernel=9), image, jitter=True, factors=[1, 1, 1, 0]), 0)
    assert view.tobytes() == resized.tobytes()


def test_centre_crop(image: Image.Image) -> None:
    (spec,) = preset("eval", size=30, resize=40)
    expected = F.center_crop(F.resize(image, [40]), [30])
    assert apply(image, one_view(spec, image), 0).tobytes() == expected.tobytes()


def test_a_truncated_jpeg_is_an_error(shard_set: ShardSet) -> None:
    data = Reader(shard_set).read(0)
    for part in (0, 0.01, 0.5, 0.9):
        with pytest.raises(ValueError, match=r"(?i)truncated|identify"):
            decode(data[: int(len(data) * part)])
