import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.train.runs import settings, settings_of
from train.config import load_config
from train.engine import checkpoint
from train.engine.step import TrainStep
from train.losses.reconstruction import similarity_distillation
from train.methods import build_method
from train.methods.distill import Distill, DistillConfig, Representations
from train.model.draws import Draws
from train.model.encoder import Encoder, EncoderConfig
from train.optim.optimizers import OptimConfig, build_optimizer
from train.pretrain import build, pretrain
from train.processes.distributed import World

_TEACHER = EncoderConfig(name="resnet18", width=4, stem="cifar")
_DIMS, _SIZE = 32, 10
NO_DRAWS = Draws(0, 0, torch.arange(6))


def distill(**fields: Any) -> Distill:
    torch.manual_seed(0)
    config = DistillConfig(
        teacher=_TEACHER, hidden=16, queue=_SIZE, temperature=0.3, teacher_temperature=0.05, **fields
    )
    method = build_method(config, EncoderConfig(name="resnet18", width=8, stem="cifar"), World())
    assert isinstance(method, Distill)
    return method.double()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def transcribed(z: torch.Tensor, t: torch.Tensor, queue: torch.Tensor) -> torch.Tensor:
    """Equations 2 to 5, image by image."""
    total = torch.zeros(()).double()
    for student, teacher in zip(z / z.norm(dim=1, keepdim=True), t / t.norm(dim=1, keepdim=True), strict=True):
        rows = [teacher, *queue]
        p = torch.stack([torch.exp(teacher @ d / 0.05) for d in rows])
        q = torch.stack([torch.exp(student @ d / 0.3) for d in rows])
        total = total - (p / p.sum() * (q / q.sum()).log()).sum() / len(z)
    return total


def test_loss_and_gradient_are_seeds() -> None:
    method, z, t = distill(), normal(2, 6, _DIMS).requires_grad_(), normal(2, 6, _DIMS, seed=1)
    expected = (transcribed(z[0], t[0], method.queue.rows) + transcribed(z[1], t[1], method.queue.rows)) / 2
    found = method.loss(Representations(z, t, z)).value
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z))


def test_feature_regression_is_an_angle() -> None:
    method, t = distill(objective="feature"), normal(2, 6, _DIMS)
    assert method.loss(Representations(3 * t, t, t)).value.item() == pytest.approx(0)
    assert method.loss(Representations(-t, t, t)).value.item() == pytest.approx(4)
    assert not hasattr(method, "queue")


def test_a_student_that_knows_nothing_has_the_loss_of_chance() -> None:
    t, queue = F.normalize(normal(6, 8), dim=1), F.normalize(normal(20, 8, seed=1), dim=1)
    alike = F.normalize(torch.ones(20, 8).double(), dim=1)
    assert similarity_distillation(t, t, alike, 1e6, 0.01).item() == pytest.approx(math.log(21), rel=1e-4)
    assert similarity_distillation(t, t, queue, 0.1, 0.1) < similarity_distillation(-t, t, queue, 0.1, 0.1)


def test_the_teacher_never_changes_and_its_representations_enter_the_queue() -> None:
    method = distill().train()
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    step = TrainStep(method, method, build_optimizer(OptimConfig(name="sgd"), method), torch.float64)
    views = [normal(6, 3, 16, 16, seed=view) for view in range(2)]
    step(views, NO_DRAWS, 0.05, 0.1)
    assert all(torch.equal(value, before[name]) for name, value in method.teacher.state_dict().items())
    torch.testing.assert_close(method.queue.rows[:6], F.normalize(method.teacher(views[0]), dim=1))


def test_the_teacher_is_a_runs_or_a_files(shards: Path, tmp_path: Path) -> None:
    assert pretrain(load_config(None, settings(shards, tmp_path / "teacher")), World())
    exported = checkpoint.load_encoder(tmp_path / "teacher")
    timm = Encoder(EncoderConfig(name="timm:vit_tiny_patch16_224", image_size=32)).backbone
    weights = {**timm.state_dict(), "head.weight": torch.zeros(1000, 192), "head.bias": torch.zeros(1000)}
    torch.save(weights, tmp_path / "timm.pt")
    for teacher, path, expected in (
        ("{name: resnet18, width: 8}", tmp_path / "teacher", exported.state_dict()),
        ("{name: 'timm:vit_tiny_patch16_224', image_size: 32}", tmp_path / "timm.pt", timm.state_dict()),
    ):
        chosen = settings_of("distill", shards, tmp_path / "run", f"method.teacher={teacher}", f"method.weights={path}")
        method: Any = build(load_config(None, chosen), World())
        for name, value in method.teacher.state_dict().items():
            assert torch.equal(value, expected[name] if name in expected else expected[name.removeprefix("backbone.")])


def test_weights_that_do_not_fit_are_named(shards: Path, tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pt")
    chosen = settings_of("distill", shards, tmp_path / "run", f"method.weights={tmp_path / 'other.pt'}")
    with pytest.raises(checkpoint.CheckpointError, match=r"method.weights: .*other.pt.*set `method.teacher` to"):
        build(load_config(None, chosen), World())


def test_without_weights_a_warning_says_so(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build(load_config(None, settings_of("distill", shards, tmp_path / "run")), World())
    assert "method.weights is not set" in caplog.text
