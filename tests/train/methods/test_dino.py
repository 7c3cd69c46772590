import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.processes import run_ranks
from train.engine.step import TrainStep
from train.methods import Update, build_method
from train.methods.dino import DINO, DINOConfig, Logits
from train.model.batchnorm import synchronize_batchnorm
from train.model.draws import Draws
from train.model.encoder import EncoderConfig
from train.optim.optimizers import OptimConfig, build_optimizer
from train.processes.distributed import World

NO_DRAWS = Draws(0, 0, torch.arange(6))
ACCEPTED = torch.tensor(1.0)
ALONE = World()
RESNET = EncoderConfig(name="resnet18", width=8, stem="cifar")


def build(encoder: EncoderConfig = RESNET, world: World = ALONE, **fields: float | str) -> DINO:
    torch.manual_seed(0)
    config = DINOConfig.model_validate({"hidden": 16, "bottleneck": 8, "out": 10, **fields})
    method = build_method(config, encoder, world).double()
    assert isinstance(method, DINO)
    return method


def views(*sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(6, 3, size, size) for size in sizes or (24, 24, 16, 16)]
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes]


def stepped(method: DINO, number: int, pieces: int = 1) -> torch.Tensor:
    optimizer = build_optimizer(OptimConfig(name="adamw", weight_decay=0.1), method)
    step = TrainStep(method, method, optimizer, torch.float64, micro_batch_size=6 // pieces)
    return step(views(), NO_DRAWS, 0.01, number / 10).value


def transcribed(logits: Logits, centre: torch.Tensor, temperature: float) -> torch.Tensor:
    """Algorithm 1 of the paper with multi-crop: H(t, s) over all pairs of different views."""
    total, count = torch.zeros(()).double(), 0
    for t in range(2):
        target = F.softmax((logits.teacher[t] - centre) / temperature, dim=1)
        for s in range(len(logits.student)):
            if s != t:
                total = total - (target * (logits.student[s] / 0.1).softmax(1).log()).sum(1).mean()
                count += 1
    return total / count


def test_loss_and_gradient_are_the_papers() -> None:
    method = build()
    nn.init.normal_(method.centre)
    made = method(views(), NO_DRAWS)
    results = []
    for loss in (lambda e: transcribed(e, method.centre, 0.04), lambda e: method.loss(e).value):
        leaf = made.student.detach().clone().requires_grad_()
        value = loss(Logits(leaf, made.teacher, leaf))
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_the_teacher_sees_the_global_views_and_has_no_gradient() -> None:
    made = build()(views(), NO_DRAWS)
    assert (made.student.shape, made.teacher.shape) == ((4, 6, 10), (2, 6, 10))
    assert made.student.requires_grad
    assert not made.teacher.requires_grad
    torch.testing.assert_close(made.teacher, made.student[:2])  # before the first update, the two are one


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_centre_follows_the_mean_of_the_batch(pieces: int) -> None:
    method = build(norm="none", encoder=EncoderConfig(name="timm:test_vit", image_size=32))
    images = [F.interpolate(view, size=(32, 32)) for view in views()]
    optimizer = build_optimizer(OptimConfig(name="sgd"), method)
    step = TrainStep(method, method, optimizer, torch.float64, micro_batch_size=6 // pieces)
    for number in (1, 2):
        before, mean = method.centre.clone(), method(images, NO_DRAWS).teacher.mean((0, 1))
        step(images, NO_DRAWS, 0.1, number / 10)
        torch.testing.assert_close(method.centre, 0.9 * before + 0.1 * mean)


def test_the_teacher_follows_by_a_momentum_that_ends_at_one() -> None:
    method = build()
    for p in method.encoder.parameters():
        nn.init.normal_(p)
    for progress in (0.25, 1.0):
        before = copy.deepcopy(method.teacher_encoder)
        with torch.no_grad():
            method.after_update(Update(progress, ACCEPTED, method(views(), NO_DRAWS)))
        tau = 1 - 0.004 * (1 + math.cos(math.pi * progress)) / 2
        networks = (method.teacher_encoder, before, method.encoder)
        for ours, old, student in zip(*(network.parameters() for network in networks), strict=True):
            torch.testing.assert_close(ours, tau * old + (1 - tau) * student)
    assert method.exported() is method.teacher_encoder


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 0.04), (0.1, 0.055), (0.2, 0.07), (0.9, 0.07)])
def test_the_teachers_temperature(progress: float, expected: float) -> None:
    method = build(warmup=0.2)
    method.progress.fill_(progress)
    assert float(method._teacher_temperature()) == pytest.approx(expected)


def test_the_last_layer_is_frozen_at_first() -> None:
    """Decay changes only the lengths of its rows, which nothing depends on."""
    method = build(frozen=0.15)
    directions = [F.normalize(method.head.weight.detach(), dim=1)]
    for number in (1, 2, 3):
        stepped(method, number)
        directions.append(F.normalize(method.head.weight.detach(), dim=1))
    torch.testing.assert_close(directions[2], directions[0])
    assert (directions[3] - directions[2]).abs().max() > 1e-4


def test_the_last_layer_knows_only_directions() -> None:
    method = build()
    expected = method(views(), NO_DRAWS).student
    with torch.no_grad():
        method.head.weight.mul_(torch.rand(10, 1) + 0.5)
    torch.testing.assert_close(method(views(), NO_DRAWS).student, expected)
    assert expected.abs().max() <= 1


def test_a_refused_update_keeps_the_centre() -> None:
    method = build()
    made = method(views(), NO_DRAWS)
    with torch.no_grad():
        method.after_update(Update(0.5, torch.tensor(0.0), made._replace(teacher=made.teacher * float("nan"))))
    assert not method.centre.any()
    assert method.progress == 0


def test_metrics_tell_the_two_ways_to_collapse() -> None:
    """A uniform teacher has the entropy log K, one that always names the same dimension has none."""
    method = build()
    student = torch.zeros(4, 6, 10).double()
    uniform = method.loss(Logits(student, student[:2], student)).metrics
    peaked = method.loss(Logits(student, F.one_hot(torch.zeros(2, 6, dtype=torch.int64), 10).double(), student)).metrics
    assert uniform["teacher_entropy"].item() == pytest.approx(math.log(10))
    assert uniform["divergence"].item() == pytest.approx(0, abs=1e-12)
    assert peaked["teacher_entropy"] < 1e-6


def trained(world: World) -> dict[str, torch.Tensor]:
    method = synchronize_batchnorm(build(world=world, norm="batch"), world)
    step = TrainStep(method, world.wrap(method), build_optimizer(OptimConfig(name="sgd"), method), torch.float64)
    rows = slice(world.rank * 6 // world.size, (world.rank + 1) * 6 // world.size)
    for number in (1, 2):
        step([view[rows] for view in views()], NO_DRAWS.rows(rows), 0.05, number / 10)
    return dict(method.state_dict())


def test_batchnorm_of_the_teacher_is_synchronised_too() -> None:
    """The recipe's encoder, which the test over all methods takes, has no BatchNorm."""
    expected = trained(World())
    assert any(name.startswith("teacher_encoder") and name.endswith("running_var") for name in expected)
    for found in run_ranks(trained, 2):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_the_heads_biases_start_at_zero() -> None:
    """As in the authors' vision_transformer.py; with BatchNorm the hidden layers have none."""
    for norm in ("none", "batch"):
        linear = [layer for layer in build(norm=norm).head.mlp if isinstance(layer, nn.Linear)]
        assert [layer.bias is None for layer in linear] == [norm == "batch"] * 2 + [False]
        assert not any(layer.bias.any() for layer in linear if layer.bias is not None)
