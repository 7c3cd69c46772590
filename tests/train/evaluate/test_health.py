from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.loader import Loader
from pipeline.order import Sequential
from pipeline.views import preset
from sharding.manifest import ShardSet
from tests.train.evaluate.test_knn import CPU, clusters
from train.config import load_config
from train.engine.checkpoint import Pretrained
from train.engine.health import lidar
from train.evaluate.data import Images
from train.evaluate.features import Features
from train.evaluate.health import Health
from train.model.encoder import Encoder, EncoderConfig
from train.processes.distributed import World


def of(h: torch.Tensor) -> dict[str, float]:
    features = Features(h, torch.arange(len(h)), torch.full((len(h),), -1))
    return dict(Health()(features, features, CPU))


def test_the_spectrum_is_that_of_singular_values() -> None:
    h = clusters(200, 0).h + 3
    values = torch.linalg.svdvals(h.double())
    shares = values / values.sum()
    found = of(h)
    assert found["dimensions"] == 12
    assert found["RankMe"] == pytest.approx((-(shares * shares.log()).sum()).exp().item(), rel=1e-6)
    variances = torch.linalg.svdvals((h - h.mean(0)).double()).square()
    expected = 100 * (variances[0] / variances.sum()).item()
    assert found["variance of the first direction %"] == pytest.approx(expected, rel=1e-4)


def test_even_spectra_use_all_dimensions_and_falling_ones_few() -> None:
    q, _ = torch.linalg.qr(torch.randn(200, 16, generator=torch.Generator().manual_seed(0)))
    q = q - q.mean(0)
    even, falling = of(q), of(q * torch.arange(1.0, 17.0) ** -1.0)
    assert even["RankMe"] == pytest.approx(16, rel=0.01)
    assert falling["RankMe"] < 11
    assert even["alpha-ReQ"] == pytest.approx(0, abs=0.1)
    assert falling["alpha-ReQ"] == pytest.approx(2, rel=0.1), "eigenvalues are squares"


def test_views_are_the_runs_own_of_test_images_that_are_evenly_chosen(shard_set: ShardSet, tmp_path: Path) -> None:
    """BYOL's two kinds of views in turn; its local ones, of a different size, are left out."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(name="resnet18", width=8)).eval()
    config = load_config(None, ["data.num_threads=1"])
    config = config.model_copy(update={"views": preset("byol", size=32, kernel=5) + preset("mae", size=16)})
    test = Features(torch.zeros(92, 1), ids := torch.arange(1, 92, 2), torch.zeros(46, dtype=torch.int64))
    given = Pretrained(encoder, config, 1, None, tmp_path, tmp_path), Images(shard_set, ids.numpy()), test, World()
    found = Health(images=16, views=3).together(*given)

    first, second = preset("byol", size=32, kernel=5)
    order = Sequential(ids.numpy()[::3], 16)
    with Loader(shard_set, (first, second, first), seed=0, order=order) as loader, torch.inference_mode():
        z = torch.stack([encoder(view) for view in next(loader).views]).double()
    assert z.shape == (3, 16, 64)
    unit = z / z.norm(dim=2, keepdim=True)
    pairs = [(unit[0] - unit[1]).square().sum(1), (unit[1] - unit[2]).square().sum(1)]
    assert found["alignment"] == pytest.approx(torch.cat(pairs).mean().item(), rel=1e-4)
    different = ~torch.eye(16, dtype=torch.bool)
    distances = [torch.cdist(view, view)[different].square() for view in unit]
    expected = np.mean([(-2 * distance).exp().mean().log().item() for distance in distances])
    assert found["uniformity"] == pytest.approx(expected, rel=1e-3)
    assert found["LiDAR"] == pytest.approx(lidar(z).item(), rel=1e-3)
