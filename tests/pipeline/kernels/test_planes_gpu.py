from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from pipeline.kernels.planes_gpu import convert
from pipeline.plan import BatchPlan
from sharding.planes import encode_planes, split_planes, to_rgb
from tests.pipeline.gpu_kernels import DEVICE, noise, plan_for

SIZES = np.array([(1, 1), (1, 9), (9, 1), (4, 4), (7, 3), (6, 5), (33, 70), (40, 131)])


@pytest.mark.parametrize("seed", range(8))
def test_every_region_has_the_pixels_of_the_whole_image(seed: int) -> None:
    rng = np.random.default_rng(seed)
    frames = [np.frombuffer(encode_planes(noise(height, width, seed)), np.uint8) for height, width in SIZES]
    corners = rng.integers(0, SIZES)
    regions = np.concatenate([corners, rng.integers(1, SIZES - corners + 1)], axis=1)
    view = replace(plan_for([np.empty((*size, 3)) for size in SIZES], size=8, kernel=1), edge=regions)
    plan = BatchPlan(0, np.arange(len(SIZES)), SIZES[:, 0], SIZES[:, 1], (view,))
    ends = np.cumsum([len(frame) for frame in frames])
    images = convert(torch.from_numpy(np.concatenate(frames)).to(DEVICE), ends, plan)
    assert images.memory is not None
    parts = np.split(images.memory.cpu().numpy(), np.cumsum(regions[:, 2] * regions[:, 3])[:-1])
    for part, frame, size, (top, left, height, width) in zip(parts, frames, SIZES, regions, strict=True):
        whole = to_rgb(*split_planes(frame, *size.tolist()))
        assert_array_equal(part.reshape(height, width, 3), whole[top : top + height, left : left + width])
