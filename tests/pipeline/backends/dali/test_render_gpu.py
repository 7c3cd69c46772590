import os
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg

from pipeline.backends import DamagedSampleError
from pipeline.backends.dali.decode import Decoder
from pipeline.backends.dali.render_gpu import check_sizes, locate, make_views
from pipeline.plan import BatchPlan, ViewPlan
from tests.pipeline.gpu_kernels import DEVICE, expected, noise, on_device, plan_for


def plan_of(views: tuple[ViewPlan, ...]) -> BatchPlan:
    """The sizes of the images are nothing to a renderer."""
    ids = np.arange(len(views[0]))
    return BatchPlan(0, ids, np.zeros_like(ids), np.zeros_like(ids), views)


def test_views_of_different_kinds_from_the_same_images() -> None:
    images = [noise(40, 56, seed) for seed in range(4)]
    plans = plan_for(images, size=24, kernel=7, solarize=0.5), plan_for(images, seed=1, size=16, blur=0)
    with on_device(images) as located:
        views = [view.cpu().numpy() for view in make_views(located, plan_of(plans))]
    for view, plan in zip(views, plans, strict=True):
        assert view.shape == (4, plan.spec.size, plan.spec.size, 3)
        assert np.abs(view.astype(int) - expected(images, plan)).mean() <= 0.5


def test_images_are_read_where_dali_decoded_them() -> None:
    """Of any size; on the CPU, DALI's lists have the same methods as on a GPU."""
    encoded = [simplejpeg.encode_jpeg(noise(h, w), 95, "RGB", "444") for h, w in ((37, 51), (64, 40), (20, 23))]
    decoded = [simplejpeg.decode_jpeg(image) for image in encoded]
    whole = np.array([[0, 0, *image.shape[:2]] for image in decoded])
    plan = plan_for(decoded, size=16, jitter=0, grey=0, blur=0)
    decoder = Decoder(3, 1, 0 if DEVICE.type == "cuda" else None, largest=(64, 51))
    decoder.schedule([np.frombuffer(image, np.uint8) for image in encoded], whole)
    images = decoder.collect(None)
    (view,) = make_views(locate(images, DEVICE), plan_of((plan,)))
    assert np.abs(view.cpu().numpy().astype(int) - expected(decoded, plan)).mean() <= 0.5
    decoder.close()


def test_images_smaller_than_their_regions_are_undecodable() -> None:
    """Sides exchanged, as by a decoder that turns images; one row short."""
    regions = np.array([[10, 0, 30, 50], [10, 0, 30, 50], [10, 0, 30, 50]])
    sizes = np.array([[40, 50], [50, 40], [39, 50]])
    check_sizes(sizes[:1], regions[:1], np.array([7]))
    with pytest.raises(DamagedSampleError) as caught:
        check_sizes(sizes, regions, np.array([7, 8, 9]))
    assert caught.value.reasons.keys() == {8, 9}
    assert "[50, 40]" in caught.value.reasons[8]


def test_kernels_compile_for_gpus_to_the_arithmetic_of_the_interpreter() -> None:
    """The interpreter accepts what the compiler may not; the compiler needs no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.pipeline.compile_kernels"]
    subprocess.run(command, env=environment, check=True)
