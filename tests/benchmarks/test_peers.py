from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import ColorJitter
from torchvision.transforms import functional as F

from benchmarks.peers import PEERS, PeerOptions, build_peer
from pipeline.views import ViewSpec, flatten
from sharding.manifest import ShardSet
from tests.census import census, wait_until

SPECS = (ViewSpec(count=2, size=32, kernel=5), ViewSpec(size=16, scale=(0.05, 0.3), kernel=3, solarize=0.5))


def options(shards: ShardSet) -> PeerOptions:
    return PeerOptions(shards, flatten(SPECS), batch_size=8, num_threads=1, prefetch=2)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_peer_makes_batches_without_end_and_leaves_nothing(name: str, shard_set: ShardSet) -> None:
    before, files, torch_threads = census(), sorted(shard_set.root.parent.iterdir()), torch.get_num_threads()
    try:
        peer = build_peer(name, options(shard_set))
    except ImportError as error:
        pytest.skip(str(error))
    assert [peer.next_batch() for _ in range(14)] == 14 * [8]  # more than a pass over 92 samples
    peer.close()
    del peer
    wait_until(lambda: census() <= before)  # queues' feeder threads end by themselves
    assert sorted(shard_set.root.parent.iterdir()) == files
    assert torch.get_num_threads() == torch_threads


def test_an_unknown_peer_is_refused(shard_set: ShardSet) -> None:
    with pytest.raises(ValueError, match="one of decode-only, decode-only-dali, imagefolder"):
        build_peer("magic", options(shard_set))


def test_a_peer_that_is_not_installed_is_named_with_its_extra(
    shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PEERS, "absent", "absent.module:build")
    with pytest.raises(ImportError, match=r"No module named 'absent'; it comes with the extra 'absent'"):
        build_peer("absent", options(shard_set))


@pytest.fixture
def photo(shard_set: ShardSet, tmp_path: Path) -> Path:
    """A file for SPDL, where it is installed."""
    try:
        build_peer("spdl", options(shard_set)).close()
    except ImportError as error:
        pytest.skip(str(error))
    y, x = np.mgrid[:96, :96]
    path = tmp_path / "7" / "photo.jpg"
    path.parent.mkdir()
    pixels = np.stack([2 * x + 20, 2 * y + 30, 220 - x - y], axis=2).astype(np.uint8)
    Image.fromarray(pixels).save(path, quality=95, subsampling=0)
    return path


def spdl_view(path: Path, **changes: Any) -> torch.Tensor:
    """The whole image (3, 96, 96), values 0 to 255, with no operation but those of ``changes``."""
    from benchmarks.peers import spdl

    nothing = {"scale": (1, 1), "ratio": (1, 1), "flip": 0, "jitter": 0, "grey": 0, "blur": 0}
    spec = ViewSpec(size=96, **{**nothing, **changes})
    [views], labels = spdl._collate([spec], [spdl._make_views([spec], path)])
    assert labels.tolist() == [7]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return 255 * (views[0] * std + mean)


def distance(view: torch.Tensor, image: Image.Image) -> float:
    """Mean over all values, of 255."""
    return (view - F.pil_to_tensor(image)).abs().mean().item()


def test_spdls_filters_are_torchvisions_operations(photo: Path) -> None:
    image = Image.open(photo)
    assert distance(spdl_view(photo), image) < 1
    assert distance(spdl_view(photo, flip=1), F.hflip(image)) < 1
    assert distance(spdl_view(photo, grey=1), F.rgb_to_grayscale(image, 3)) < 1
    assert distance(spdl_view(photo, solarize=1), F.solarize(image, 128)) < 3  # some values pass the threshold


@pytest.mark.parametrize(
    ("operation", "change", "factor", "opposite"),
    [
        (0, F.adjust_brightness, 0.4, 1.6),
        (0, F.adjust_brightness, 1.6, 0.4),
        (1, F.adjust_contrast, 0.4, 1.6),
        (1, F.adjust_contrast, 1.6, 0.4),
        (2, F.adjust_saturation, 0.4, 1.6),
        (2, F.adjust_saturation, 1.6, 0.4),
        (3, F.adjust_hue, 0.1, -0.1),
        (3, F.adjust_hue, -0.1, 0.1),
    ],
)
def test_spdls_jitter_is_torchvisions_or_near_it(
    operation: int,
    change: Callable[[Image.Image, float], Image.Image],
    factor: float,
    opposite: float,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    factors = [factor if number == operation else None for number in range(4)]
    monkeypatch.setattr(ColorJitter, "get_params", lambda *_: (torch.tensor([2, 0, 3, 1]), *factors))
    view, image = spdl_view(photo, jitter=1), Image.open(photo)
    error = distance(view, change(image, factor))
    if change in (F.adjust_brightness, F.adjust_saturation):
        assert error < 2
    else:
        assert error < distance(view, change(image, opposite)) / 2


def test_torchvisions_views_are_normalised_tensors_of_the_specs_sizes() -> None:
    from PIL import Image

    from benchmarks.peers.transforms import MakeViews

    views = MakeViews(flatten(SPECS))(Image.new("L", (60, 50), 128))
    assert [tuple(view.shape) for view in views] == [(3, 32, 32), (3, 32, 32), (3, 16, 16)]
    assert all(view.dtype == torch.float32 and -3 < view.min() < view.max() + 1e-6 < 3 for view in views)
