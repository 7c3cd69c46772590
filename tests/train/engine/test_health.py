import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.processes import run_ranks
from tests.train.runs import settings
from train.config import load_config
from train.engine import health
from train.engine.monitor import read_metrics
from train.losses.contrastive import uniformity
from train.methods import Loss, build_method
from train.methods.byol import BYOL, BYOLConfig
from train.methods.simclr import SimCLRConfig
from train.model.encoder import EncoderConfig
from train.pretrain import pretrain
from train.processes.distributed import World


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def views(noise: float, num_images: int = 40, dims: int = 6) -> torch.Tensor:
    """Two views of each image, apart by some noise."""
    return normal(num_images, dims) + noise * normal(2, num_images, dims, seed=1)


def test_alignment_and_uniformity_are_sums_over_pairs() -> None:
    z = views(0.5, num_images=5)
    x, y = (z[v] / z[v].norm(dim=1, keepdim=True) for v in range(2))
    apart = [float((x[i] - y[i]).norm() ** 2) for i in range(5)]
    assert health.alignment(z).item() == pytest.approx(sum(apart) / 5)
    logs = []
    for view in (x, y):
        pairs = [math.exp(-2 * float((view[i] - view[j]).norm() ** 2)) for i in range(5) for j in range(5) if i != j]
        logs.append(math.log(sum(pairs) / len(pairs)))
    assert uniformity(z).item() == pytest.approx(sum(logs) / 2)


def test_the_standard_deviation_is_one_for_a_gaussian_and_zero_for_a_point() -> None:
    assert health.embedding_std(normal(2, 4000, 32)).item() == pytest.approx(1, abs=0.01)
    assert health.embedding_std(normal(1, 1, 32).expand(2, 10, 32)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_rankme_counts_equal_dimensions(rank: int) -> None:
    orthogonal = torch.linalg.qr(normal(20, 6))[0][:, :rank] @ torch.linalg.qr(normal(6, 6, seed=1))[0][:rank]
    assert health.rankme(torch.linalg.svdvals(orthogonal)).item() == pytest.approx(rank)


def test_rankme_is_the_papers() -> None:
    sigma = torch.linalg.svdvals(normal(30, 6))
    shares = [float(s / sigma.sum()) for s in sigma]
    assert health.rankme(sigma).item() == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_req_finds_the_exponent(alpha: float) -> None:
    assert health.alpha_req(3 * torch.arange(100, 0, -1).double() ** -alpha).item() == pytest.approx(alpha)


def transcribed_lidar(z: np.ndarray[Any, Any], delta: float) -> float:
    """Image by image, with roots of matrices, as the paper has it."""
    num_views, num_images, dims = z.shape
    means, grand = z.mean(0), z.mean((0, 1))
    between, within = np.zeros((dims, dims)), np.zeros((dims, dims))
    for i in range(num_images):
        between += np.outer(means[i] - grand, means[i] - grand) / (num_images - 1)
        for v in range(num_views):
            within += np.outer(z[v, i] - means[i], z[v, i] - means[i]) / (num_images * (num_views - 1))
    values, vectors = np.linalg.eigh(within + delta * np.eye(dims))
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    return math.exp(-sum(p * math.log(p) for p in _shares(np.linalg.eigvalsh(root @ between @ root))))


def _shares(values: np.ndarray[Any, Any]) -> list[float]:
    return [float(value) for value in values / values.sum()]


@pytest.mark.parametrize(("num_images", "dims"), [(40, 6), (5, 8)])
def test_lidar_is_the_papers(num_images: int, dims: int) -> None:
    z = views(0.3, num_images, dims)
    if num_images < dims:  # then the rank of B is at most N - 1, and the transcription's zeros have no logarithm
        assert health.lidar(z).item() < num_images
    else:
        assert health.lidar(z).item() == pytest.approx(transcribed_lidar(z.numpy(), 1e-4))


def test_lidar_does_not_count_dimensions_that_tell_views_apart() -> None:
    z = normal(400, 8).repeat(2, 1, 1) + 1e-3 * normal(2, 400, 8, seed=1)
    noisy = z.clone()
    noisy[..., 4:] = normal(2, 400, 4, seed=2)
    assert health.lidar(z).item() > 7.5
    assert health.lidar(noisy).item() < 4.5


def simclr() -> Any:
    torch.manual_seed(0)
    return build_method(SimCLRConfig(hidden=8, out=8), EncoderConfig(name="resnet18", width=8), World())


def measured(world: World) -> dict[str, float]:
    rows = slice(world.rank * 12 // world.size, (world.rank + 1) * 12 // world.size)
    loss = Loss(torch.zeros(()), {}, health.sample(views(0.2, 12)[:, rows]))
    return {name: value.item() for name, value in health.measure(simclr(), loss, world).items()}


def test_all_processes_measure_the_global_batch() -> None:
    alone = measured(World())
    assert alone["rankme"] > 2
    for rank in run_ranks(measured, 2):
        assert rank == pytest.approx(alone, rel=1e-6)


def test_contrast_is_how_often_the_other_view_is_the_nearest() -> None:
    z = views(0.5, 30)
    unit = z / z.norm(dim=-1, keepdim=True)
    places = []
    for i in range(30):
        own = float(unit[0, i] @ unit[1, i])
        places.append(sum(float(unit[0, i] @ unit[v, j]) >= own for v in range(2) for j in range(30) if j != i))
    found = health.contrast(z)
    for k in (1, 5):
        expected = 100 * sum(place < k for place in places) / 30
        assert 0 < expected < 100
        assert found[f"contrast_top{k}_percent"].item() == pytest.approx(expected)
    assert health.contrast(z[:, :1].expand(2, 30, 6))["contrast_top5_percent"] == 0, "collapsed"


def test_samples_of_wide_embeddings_are_bounded() -> None:
    z = normal(8, 3, 65536)
    assert health.sample(z).shape == (2, 3, 512)
    assert torch.equal(health.sample(z)[1, 2], z[1, 2, ::128])
    assert health.sample(normal(1, 3, 700)).shape == (1, 3, 350)


def test_one_view_has_no_alignment_and_a_teacher_has_a_distance() -> None:
    method = build_method(BYOLConfig(hidden=8, out=8), EncoderConfig(name="resnet18", width=8), World())
    with torch.no_grad():
        for p in method.encoder.parameters():
            p.mul_(2)
        method.projector = torch.nn.Identity()
        method.teacher_projector = torch.nn.Identity()
    found = health.measure(method, Loss(torch.zeros(()), {}, views(0.2)[:1]), World())
    assert "alignment" not in found
    assert "lidar" not in found
    assert found["teacher_distance"].item() == pytest.approx(0.5)


def run(shards: Path, directory: Path, *more: str) -> list[dict[str, Any]]:
    wanted = settings(shards, directory, *more)
    known = [s for s in wanted if not s.startswith("method.temperature") or "method.name" not in " ".join(more)]
    assert pretrain(load_config(None, known), World())
    return read_metrics(directory)


CONFIGS = Path(__file__).parents[3] / "configs"


def demo(shards: Path, directory: Path, method: str, steps: int, *more: str) -> list[dict[str, Any]]:
    """Of the method's demo recipe, at its own rate (4e-3 for 256 images) in each step, on few and small images."""
    small = ["views.size=32", "run.global_batch_size=32", "optim.learning_rate=1.6e-2", "run.online=false"]
    where = [f"data.shards={shards}", f"run.dir={directory}", "data.num_threads=1", f"optim.steps={steps}"]
    assert pretrain(load_config(CONFIGS / f"demo-{method}.yaml", [*where, *small, *more]), World())
    return read_metrics(directory)


@pytest.mark.parametrize(
    ("method", "made_to", "sign"),
    [
        ("vicreg", "method.variance=0", "complete collapse: z_std is 0"),
        ("lejepa", "method.regularizer=0", "complete collapse: z_std is 0"),
        ("dino", "method.norm=batch", "collapse to the uniform distribution: teacher_entropy_percent is 99"),
    ],
)
def test_a_demo_recipe_that_collapses_is_called_so(
    method: str, made_to: str, sign: str, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DINO's does so as it is. When it continues, its first record still says so."""
    records = demo(shards, tmp_path, method, 60, made_to)
    assert records[-1]["collapse"].startswith(sign)
    assert sign in caplog.text
    assert "collapse" in demo(shards, tmp_path, method, 70, made_to)[-1]


@pytest.mark.parametrize("method", ["vicreg", "lejepa"])
def test_a_demo_recipe_that_learns_is_not(method: str, shards: Path, tmp_path: Path) -> None:
    assert not any("collapse" in record for record in demo(shards, tmp_path, method, 60))


def test_byol_without_predictor_is_called_collapsed(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ("method.name=byol", "optim.learning_rate=0.5", "optim.steps=60", "method.tau=0.9", "run.log_every=5")
    healthy = run(shards, tmp_path / "healthy", *recipe)
    monkeypatch.setattr(BYOL, "__init__", without_predictor)
    records = run(shards, tmp_path / "run", *recipe)
    assert "collapse" in records[-1]
    assert not any("collapse" in record for record in healthy)


_init = BYOL.__init__


def without_predictor(self: Any, *arguments: Any) -> None:
    _init(self, *arguments)
    self.predictor = torch.nn.Identity()


def told(values: list[float], name: str = "embedding_std") -> list[str | None]:
    watch = health.Watch()
    return [watch({"embedding_std": 0.9, "rankme": 30.0, name: value}) for value in values]


def test_a_sign_has_to_last_and_to_be_a_fall() -> None:
    assert told([0.8, 0.04, 0.5, 0.04, 0.03])[3:] == [None, "complete collapse: embedding_std is 0.03 and was 0.8"]
    assert told([0.8, 0.04, 0.5]) == [None] * 3
    assert told([0.01, 0.01, 0.02, 0.1, 0.2]) == [None] * 5  # an untrained ViT
    assert str(told([40.0, 1.2, 1.1], "rankme")[2]).startswith("dimensional collapse: rankme is 1.1")


def test_lengths_are_watched_where_they_are_told_and_teachers_where_embeddings_fell_too() -> None:
    watch = health.Watch()
    assert [watch({"embedding_std": 0.9, "rankme": 30.0, "z_std": z}) for z in (0.3, 0.09, 0.08)][1:] == [
        None,
        "complete collapse: z_std is 0.08 and was 0.3",
    ]
    for stds, collapsed in (((0.6, 0.28, 0.28), True), ((0.1, 0.09, 0.09), False)):
        watch = health.Watch()
        said = [watch({"embedding_std": s, "rankme": 30.0, "teacher_entropy_percent": 99.5}) for s in stds]
        assert bool(said[-1]) == collapsed
