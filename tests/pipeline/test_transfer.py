import numpy as np
import pytest
import torch
from torchvision.transforms import functional as F

from benchmarks.measure import peak_bytes
from pipeline import transfer
from pipeline.plan import BatchPlan, plan_batch
from pipeline.transfer import normalize, to_batch, to_device
from pipeline.views import ViewSpec

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_images(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_normalize_equals_torchvision(device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
    images = random_images(5, 6, 7, 3)
    values = normalize(images.to(device), MEAN, STD, dtype)
    expected = F.normalize(images.permute(0, 3, 1, 2) / 255, list(MEAN), list(STD))
    assert values.dtype == dtype
    assert values.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(values.cpu().float(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("part", [1, 2 * 6 * 7 * 3, 2**26])
def test_a_gpus_parts_are_the_whole(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_PART", part)
    images = random_images(5, 6, 7, 3)
    constants = transfer._row_constants(MEAN, STD, 7, CPU)
    made = transfer._scale_parts(images, *constants, torch.float32).permute(0, 3, 1, 2)
    torch.testing.assert_close(made, normalize(images, MEAN, STD, torch.float32), rtol=0, atol=1e-6)


def test_a_gpu_holds_few_images_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_PART", 2 * 64 * 64 * 3)
    images, constants = random_images(16, 64, 64, 3), transfer._row_constants(MEAN, STD, 64, CPU)
    peak = peak_bytes(lambda: transfer._scale_parts(images, *constants, torch.bfloat16))
    assert peak < 1.6 * 2 * images.numel(), "the result and two parts of an eighth, each twice as long"


def test_normalize_leaves_its_input_alone() -> None:
    images = random_images(2, 4, 4, 3)
    before = images.clone()
    normalize(images, MEAN, STD, torch.float32)
    assert torch.equal(images, before)


def test_views_are_normalised_by_their_own_specs() -> None:
    specs = ViewSpec(size=4, blur=0), ViewSpec(size=2, blur=0, mean=(0, 0, 0), std=(1, 1, 1))
    plan = two_images(specs)
    views = [random_images(2, 4, 4, 3), random_images(2, 2, 2, 3)]
    first, second = to_batch(views, plan, CPU, torch.float32)
    torch.testing.assert_close(first, normalize(views[0], specs[0].mean, specs[0].std, torch.float32))
    torch.testing.assert_close(second, views[1].permute(0, 3, 1, 2) / 255)


def test_views_that_are_there_are_not_copied() -> None:
    views = [random_images(1, 2, 2, 3)]
    assert to_device(views, CPU)[0].data_ptr() == views[0].data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the copy to one is not tested")
def test_copies_to_a_gpu() -> None:
    views = [random_images(3, 8, 8, 3), random_images(3, 4, 4, 3)]
    for view, copy in zip(views, to_device(views, torch.device("cuda")), strict=True):
        assert copy.device.type == "cuda"
        assert torch.equal(copy.cpu(), view)


def two_images(specs: tuple[ViewSpec, ...]) -> BatchPlan:
    sides = np.array([8, 8])
    return plan_batch(specs, 0, 0, np.arange(2), np.zeros(2, np.int64), sides, sides)
