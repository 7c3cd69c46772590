"""What every method of the table promises; a new row is tested without new code."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.loader import Batch
from pipeline.views import flatten, preset
from tests.processes import run_ranks
from tests.train.model.test_checkpointing import batch_of, task_of
from tests.train.runs import has_vit, narrow
from train.engine import automatic
from train.engine.step import TrainStep
from train.methods import METHODS, Method, build_method, method_class
from train.model.batchnorm import synchronize_batchnorm
from train.model.draws import Draws
from train.model.encoder import EncoderConfig
from train.optim.optimizers import OptimConfig, build_optimizer
from train.processes.distributed import World

_BATCH = 12
_STEP = 7
every_method = pytest.mark.parametrize("name", METHODS)
VARIANTS: dict[str, dict[str, Any]] = {
    "swav with a full queue": {"queue": 12, "queue_starts": 0.0},
    "distill of features": {"objective": "feature"},
    "simclr without norm": {"norm": "none"},
    "simclr by the spectral loss": {"loss": "spectral"},
}
every_variant = pytest.mark.parametrize("name", [*METHODS, *VARIANTS])


def chosen(name: str) -> type[Method]:
    """Of a row of the table, or of a variant, whose first word it is."""
    return method_class(name.split()[0])


def views(name: str) -> list[torch.Tensor]:
    """Of the recipe's kinds, two of each at most, as small as the encoder takes them."""
    size = 32 if has_vit(name.split()[0]) else 16
    groups = preset(chosen(name).recipe.views)
    specs = flatten([group.model_copy(update={"count": min(2, group.count)}) for group in groups])
    generator = torch.Generator().manual_seed(1)
    shapes = len(specs) * [(_BATCH, 3, size, size)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def labels() -> torch.Tensor:
    return torch.arange(_BATCH) % 3


def small_encoder(name: str) -> EncoderConfig:
    """Of the kind that the recipe has: a ViT, which drops paths, or a ResNet."""
    if has_vit(name.split()[0]):
        return EncoderConfig(name="timm:test_vit", image_size=32, drop_path=0.4)
    return EncoderConfig(name="resnet18", width=8, stem="cifar")


def build(name: str, world: World, batchnorm: bool = True) -> Method:
    torch.manual_seed(0)
    config = chosen(name).Config.model_validate(narrow(chosen(name).Config) | VARIANTS.get(name, {}))
    method = build_method(config, small_encoder(name), world).double()
    for module in list(method.modules()):
        for child_name, child in module.named_children():
            if not batchnorm and isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(module, child_name, nn.Identity())
    return method


def train(world: World, name: str, pieces: int = 1, batchnorm: bool = True) -> dict[str, torch.Tensor]:
    """The method's whole state after two steps, and the losses."""
    method = synchronize_batchnorm(build(name, world, batchnorm), world)
    optimizer = build_optimizer(OptimConfig(name="sgd"), method)
    per_rank = _BATCH // world.size
    rows = slice(world.rank * per_rank, (world.rank + 1) * per_rank)
    step = TrainStep(method, world.wrap(method), optimizer, torch.float64, micro_batch_size=per_rank // pieces)
    state: dict[str, torch.Tensor] = {}
    for number in range(2):
        draws = Draws(0, _STEP + number, torch.arange(100, 100 + _BATCH)[rows])
        loss = step([view[rows] for view in views(name)], draws, 0.05, (number + 1) / 10, labels()[rows])
        state |= {f"loss.{number}": world.mean(loss.value)}
        state |= {f"metrics.{number}.{k}": world.mean(v) for k, v in loss.metrics.items()}
    return state | dict(method.state_dict())


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=rtol, atol=rtol), name


def train_all(world: World, pieces: int, batchnorm: bool) -> dict[str, dict[str, torch.Tensor]]:
    return {name: train(world, name, pieces, batchnorm) for name in [*METHODS, *VARIANTS]}


@pytest.fixture(scope="module")
def processes() -> list[Any]:
    """Three, of whose sums the order shows."""
    return run_ranks(train_all, 3, 1, True)


@pytest.fixture(scope="module")
def processes_with_pieces() -> list[Any]:
    return run_ranks(train_all, 2, 2, False)


@every_variant
def test_many_processes_make_the_steps_of_one(name: str, processes: list[Any]) -> None:
    expected = train(World(), name)
    for found in processes:
        assert_equal(found[name], expected, rtol=1e-9)


@every_variant
def test_pieces_make_the_steps_of_the_undivided_batch(name: str, processes_with_pieces: list[Any]) -> None:
    """Without BatchNorm, whose statistics would be those of a piece; in one process, and in several."""
    expected = train(World(), name, batchnorm=False)
    assert_equal(train(World(), name, 3, batchnorm=False), expected, rtol=1e-10)
    for found in processes_with_pieces:
        assert_equal(found[name], expected, rtol=1e-10)


@every_method
def test_a_step_reads_no_generator_of_torch(name: str) -> None:
    method = build(name, World())
    step = TrainStep(method, method, build_optimizer(OptimConfig(name="sgd"), method), torch.float64)
    before = torch.get_rng_state()
    step(views(name), Draws(0, _STEP, torch.arange(_BATCH)), 0.05, 0.1, labels())
    assert torch.equal(torch.get_rng_state(), before)


@every_method
def test_a_refused_update_changes_nothing(name: str) -> None:
    """But for BatchNorm's statistics, which belong to the forward pass."""
    method = build(name, World(), batchnorm=False)
    step = TrainStep(method, method, build_optimizer(OptimConfig(name="sgd"), method), torch.float64)
    draws = Draws(0, _STEP, torch.arange(_BATCH))
    step(views(name), draws, 0.05, 0.1, labels())
    before = {k: v.clone() for k, v in method.state_dict().items()}
    poisoned = views(name)
    poisoned[0][0, 0, 0, 0] = float("nan")
    for batch in (poisoned, views(name)):
        step(batch, draws, 0.05, 0.2, labels())
    for key, value in method.state_dict().items():
        assert torch.equal(value, before[key]), key


def losses(name: str, built_anew_at: int | None = None) -> list[torch.Tensor]:
    """Of three steps; before one of them the method is built anew and given its state."""
    method, found = build(name, World()), []
    for number in range(3):
        if number == built_anew_at:
            state = {key: value.clone() for key, value in method.state_dict().items()}
            method = build(name, World())
            for parameter in method.parameters():
                parameter.data.zero_()
            method.load_state_dict(state)
        step = TrainStep(method, method, build_optimizer(OptimConfig(name="sgd"), method), torch.float64)
        draws = Draws(0, number, torch.arange(_BATCH))
        found.append(step(views(name), draws, 0.05, 0.1 * (number + 1), labels()).value)
    return found


@every_method
def test_all_state_is_in_the_state_dict(name: str) -> None:
    assert losses(name, built_anew_at=2) == losses(name)


@every_method
def test_images_can_be_exchanged(name: str) -> None:
    """The loss does not depend on the order of the images."""
    method, order = build(name, World()), torch.arange(_BATCH).flip(0)
    ids = torch.arange(_BATCH)
    with torch.no_grad():
        first = method.loss(method(views(name), Draws(0, _STEP, ids)), labels(), Draws(0, _STEP, ids))
        method = build(name, World())
        made = method([view[order] for view in views(name)], Draws(0, _STEP, ids[order]))
        second = method.loss(made, labels()[order], Draws(0, _STEP, ids[order]))
    torch.testing.assert_close(first.value, second.value, rtol=1e-9, atol=1e-12)


@every_method
def test_exported_is_an_encoder(name: str) -> None:
    method: Any = build(name, World()).eval()
    h = method.exported()(torch.zeros(2, 3, 32, 32, dtype=torch.float64))
    assert h.shape == (2, method.exported().num_features)


class NumberOfTrueValues(TorchDispatchMode):
    """An error in operations whose results have a size that depends on values, for which a host waits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        if name in ("nonzero", "masked_select") or any(t is not None and t.dtype == torch.bool for t in indices):
            raise AssertionError(f"a step asks the device for a number of values: {name}")
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_waited_for(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An error in what asks a GPU for a value; on the CPU in what would."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        yield
        torch.cuda.set_sync_debug_mode("default")
        return

    def asks(*_: object) -> None:
        raise AssertionError("a step asks the device for a value")

    with monkeypatch.context() as patched, NumberOfTrueValues():
        for name in ("item", "cpu", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            patched.setattr(torch.Tensor, name, asks)
        yield


@every_variant
def test_a_step_waits_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the first one, in which some optimizers make their state. Has not been run on a GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = build(name, World()).to(device)
    optimizer = build_optimizer(OptimConfig(), method)
    step = TrainStep(method, method, optimizer, torch.float64, micro_batch_size=_BATCH // 2, clip_norm=1.0)
    draws = Draws(0, _STEP, torch.arange(_BATCH, device=device))
    batch, classes = [view.to(device) for view in views(name)], labels().to(device)
    step(batch, draws, 0.05, 0.1, classes)
    with nothing_waited_for(device, monkeypatch):
        step(batch, draws, 0.05, 0.2, classes)


@pytest.mark.parametrize(
    "settings",
    [
        ["run.precision=fp16", "optim.name=larc"],
        ["run.noise_scale=true", "run.micro_batch_size=6", "optim.name=lamb"],
        ["run.activation_checkpointing=true", "run.precision=bf16", "optim.name=adamw"],
        ["optim.name=sgd", "optim.weight_decay_end=0.1"],
    ],
    ids=str,
)
def test_a_step_of_a_run_waits_for_nothing(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    config, task = task_of("simclr", world, *settings)
    made = batch_of(config, world, 0)
    views = [view.to(world.device, automatic.dtype(config, world)) for view in made.views]
    batch = Batch(0, views, made.labels.to(world.device), made.ids.to(world.device))
    task(batch, 0)
    with nothing_waited_for(world.device, monkeypatch):
        task(batch, 1)
