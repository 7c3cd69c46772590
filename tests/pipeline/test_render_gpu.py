import os
import subprocess
import sys

import numpy as np

from pipeline.plan import BatchPlan
from pipeline.render_gpu import make_views
from tests.pipeline.gpu_kernels import expected, noise, on_device, plan_for


def test_views_of_different_kinds_from_the_same_images() -> None:
    images = [noise(40, 56, seed) for seed in range(4)]
    plans = plan_for(images, size=24, kernel=7, solarize=0.5), plan_for(images, seed=1, size=16, blur=0)
    views = make_views(on_device(images), BatchPlan(0, np.arange(4), plans))
    for view, plan in zip(views, plans, strict=True):
        assert view.shape == (4, plan.spec.size, plan.spec.size, 3)
        assert np.abs(view.cpu().numpy().astype(int) - expected(images, plan)).mean() <= 0.5


def test_kernels_compile_for_a_gpu() -> None:
    """The interpreter accepts what the compiler may not; the compiler needs no GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.pipeline.compile_kernels"]
    subprocess.run(command, env=environment, check=True)
