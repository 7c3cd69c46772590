"""Faults, each planted in two real processes, are found and named by the check that should see them."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train.verify
from sharding.command import UserError
from tests.processes import NO_GPU, run_ranks
from tests.train.runs import settings_of
from train.config import load_config
from train.methods import METHODS, Loss, Update
from train.methods.simclr import SimCLR
from train.model.heads import MLP
from train.pretrain import build_loader
from train.processes.distributed import World
from train.verify import deviation, main, verify

SETTINGS, SLICES, RESUMED = "settings, data, code", "the loader's slices make the batch", "a resumed loader continues"
STATISTICS, LOSS, GRADIENT = "BatchNorm's statistics", "loss", "averaged gradient"
BUFFERS, WEIGHTS = "teacher, queue, other buffers after the update", "weights after the update"
RANKS, TWICE = "weights on all ranks", "a step done twice"
PIECES = "averaged gradient, GradCache of 2 pieces, BatchNorm in evaluation"
ACCUMULATION = "averaged gradient, accumulation of 2 pieces, BatchNorm in evaluation"


class GatherWithoutGradient(World):
    def gather(self, rows: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return super().gather(rows, dim).detach()


class ResultThrownAway(World):
    def mean(self, value: torch.Tensor) -> torch.Tensor:
        super().mean(value)
        return value


class SumWhereAMeanBelongs(SimCLR):
    def loss(self, e: Any, labels: Any = None, draws: Any = None) -> Loss:
        loss = super().loss(e, labels, draws)
        return Loss(loss.value * self._world.size, loss.metrics)


class PositivesByLocalRank(SimCLR):
    """As on machines of one process each, where the local rank is 0 on all of them."""

    def loss(self, e: Any, labels: Any = None, draws: Any = None) -> Loss:
        return Loss(self._contrast(e.z, self._world.gather(e.z, dim=1), 0), {})


class ImagesSaidNotToMeet(SimCLR):
    images_meet = False


class OwnBatchNorm(nn.Module):
    """Of a kind that `synchronize_batchnorm` does not know."""

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, training=True)


class BatchNormNotSynchronised(SimCLR):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.projector = MLP(self.projector, OwnBatchNorm(48))


class OtherWeightsOnRank1(SimCLR):
    projector: Any

    def after_update(self, update: Update) -> None:
        if self._world.rank == 1:
            self.projector[0].weight[0, 0] += 1e-6


class Noise(nn.Module):
    """From a counter of its own, on one rank."""

    counter = itertools.count()

    def __init__(self, is_noisy: bool) -> None:
        super().__init__()
        self.is_noisy = is_noisy

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + 1e-6 * next(Noise.counter)) if self.is_noisy else x


class NotDeterministic(SimCLR):
    def __init__(self, config: Any, encoder: Any, world: World) -> None:
        super().__init__(config, encoder, world)
        self.projector = MLP(nn.Identity(), Noise(world.rank == 1), self.projector)


def first_slice_on_all(config: Any, shards: Any, world: World, start: int) -> Any:
    return build_loader(config, shards, replace(world, rank=0), start)


def one_step_too_far(config: Any, shards: Any, world: World, start: int) -> Any:
    return build_loader(config, shards, world, 2 * start)


# fault -> the checks that fail, the one that names it first, and words of one of them
FOUND: dict[str, tuple[list[str], str]] = {
    "other settings": ([SETTINGS], "method.temperature: rank 0 has 0.1, rank 1 has 0.7"),
    "first_slice_on_all": ([SLICES, STATISTICS, LOSS, GRADIENT, WEIGHTS], "different images or views on ranks [1]"),
    "one_step_too_far": ([RESUMED], "different images or views on ranks [0, 1]"),
    "NotDeterministic": (
        [TWICE, STATISTICS, LOSS, GRADIENT, WEIGHTS, PIECES],
        "first the output of projector.1, on rank 1;",
    ),
    "BatchNormNotSynchronised": (
        [STATISTICS, LOSS, GRADIENT, WEIGHTS, RANKS, PIECES],
        "the worst projector.1.running_",
    ),
    "PositivesByLocalRank": ([LOSS, GRADIENT, WEIGHTS], "off by"),
    "SumWhereAMeanBelongs": ([LOSS, GRADIENT, WEIGHTS], "cosine 1.000000000, length x 2.000000000, the worst"),
    "GatherWithoutGradient": ([GRADIENT, WEIGHTS], "off by"),
    "GatherWithoutGradient, fp32": ([GRADIENT, WEIGHTS], "off by"),
    "ResultThrownAway": ([BUFFERS, RANKS], "the worst centre"),
    "OtherWeightsOnRank1": ([WEIGHTS, RANKS], "rank 1's projector.0.weight is not rank 0's (1 of "),
    "ImagesSaidNotToMeet": ([ACCUMULATION], "off by"),
}


NO_FAULT = ["none", "none, fp32", "none, fp16", "fsdp", "fsdp, bf16", "together", "static"]
# settings under which nothing fails either
ALL_RIGHT: dict[str, list[str]] = {
    "fsdp": ["run.parallel=fsdp"],
    "together": ["run.noise_scale=true", "run.shard_optimizer=true", "run.activation_checkpointing=true"],
    "static": ["run.static_graph=true"],
}
# what claims no exact gradient -> its settings
NOT_EXACT: dict[str, list[str]] = {
    "bf16": ["run.gradient_compression=bf16"],
    "powersgd": ["run.gradient_compression=powersgd"],
    "local": ["run.local_sgd_period=4", "run.local_sgd_group=local"],
    "statistics": ["run.batchnorm=local"],
}


def checks(world: World, shards: Path, run: Path, fault: str) -> list[list[str]]:
    kind, _, precision = fault.partition(", ")
    planted: Any = globals().get(kind)
    method, more = "simclr", ["encoder.width=8", "views.size=16", f"run.precision={precision or 'auto'}"]
    if isinstance(planted, type) and issubclass(planted, World):
        world = planted(**vars(world))
        method = "dino" if planted is ResultThrownAway else method
    elif isinstance(planted, type):
        METHODS["simclr"] = f"{__name__}:{kind}"
    elif planted:
        vars(train.verify)["build_loader"] = planted
    more += {**ALL_RIGHT, **NOT_EXACT}.get(kind, [])
    if kind == "other settings" and world.rank == 1:
        more += ["method.temperature=0.7"]
    if method == "dino":
        more += ["encoder.name=resnet18", "encoder.stem=cifar", "encoder.image_size=null"]
    try:
        config = load_config(None, settings_of(method, shards, run, *more))
        return [list(check[:3]) for check in verify(config, world, images=8)]
    finally:
        METHODS["simclr"] = "train.methods.simclr:SimCLR"
        vars(train.verify)["build_loader"] = build_loader


def all_checks(world: World, shards: Path, run: Path) -> dict[str, list[list[str]]]:
    return {fault: checks(world, shards, run, fault) for fault in [*NO_FAULT, *NOT_EXACT, *FOUND]}


@pytest.fixture(scope="module")
def found(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    first, second = run_ranks(all_checks, 2, shards, tmp_path_factory.mktemp("verify"))
    assert first == second, "the ranks are given the same checks"
    return first


def failures(found: list[list[str]]) -> dict[str, str]:
    return {name: detail for name, status, detail in found if status == "FAIL"}


@pytest.mark.parametrize("precision", NO_FAULT)
def test_without_a_fault_everything_passes(precision: str, found: dict[str, list[list[str]]]) -> None:
    assert failures(found[precision]) == {}
    names = [name for name, status, _ in found[precision] if status == "PASS"]
    assert {SETTINGS, SLICES, RESUMED, STATISTICS, LOSS, GRADIENT, WEIGHTS, RANKS, TWICE} < set(names)
    (measured,) = [name for name, status, _ in found[precision] if status == "MEASURED"]
    assert measured == "averaged gradient, GradCache of 2 pieces"


@pytest.mark.parametrize(
    ("kind", "what", "words", "least", "most"),
    [
        ("bf16", GRADIENT, "sent as bf16", 1e-4, 2**-8),  # which rounds by at most a 256th
        ("powersgd", GRADIENT, "sent as powersgd", 0.1, 1),  # a rank of 1; never longer than the gradient
        (
            "local",
            "change of the weights",
            "by post-local SGD, averaged after 2 steps",
            1e-4,
            1.5,
        ),  # of 4 images a rank
    ],
)
def test_what_is_not_exact_is_measured_and_the_rest_is_verified_without(
    kind: str, what: str, words: str, least: float, most: float, found: dict[str, list[list[str]]]
) -> None:
    assert failures(found[kind]) == {}
    (detail,) = [d for name, status, d in found[kind] if (name, status) == (what, "MEASURED")]
    assert detail.endswith(f"; {words}")
    assert least < float(detail.removeprefix("off by ").split(",")[0]) < most


def test_statistics_that_do_not_move_are_not_said_to_be_right(found: dict[str, list[list[str]]]) -> None:
    """BatchNorm of one process's images is in evaluation mode, but for what is measured."""
    statuses = {name: status for name, status, _ in found["statistics"]}
    assert STATISTICS not in statuses
    assert (statuses[LOSS], statuses[WEIGHTS], statuses[GRADIENT]) == ("PASS", "PASS", "MEASURED")
    assert failures(found["statistics"]) == {}


def test_a_losss_limit_is_at_least_the_epsilon_of_the_precision(found: dict[str, list[list[str]]]) -> None:
    """The one process's loss may by luck be next to that in float64, when others' are not."""
    for precision, least in (("fsdp, bf16", 0.0078), ("none, fp16", 0.00098)):
        (detail,) = [detail for name, _, detail in found[precision] if name == LOSS]
        assert float(detail.split("(at most ")[1].split(")")[0]) >= least, precision


@pytest.mark.parametrize("fault", FOUND)
def test_a_fault_is_found_by_the_checks_that_should_see_it(fault: str, found: dict[str, list[list[str]]]) -> None:
    failing, words = FOUND[fault]
    failed = failures(found[fault])
    assert list(failed) == failing, failed
    assert any(words in detail for detail in failed.values()), failed


def test_a_deviation_names_the_worst_tensor_and_does_not_let_nan_pass() -> None:
    expected = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    found = deviation({"a": torch.tensor([3.0, 0.3]), "b": torch.tensor([[4.0]])}, expected, limit=0.1)
    assert (found.norm, found.excess) == pytest.approx((0.3 / 5, 0.6))
    assert found.name == "a"
    assert found.worst == pytest.approx(0.1)
    assert deviation({name: 2 * t for name, t in expected.items()}, expected).ratio == pytest.approx(2)
    assert deviation({"a": torch.tensor([math.nan, 0.0]), "b": torch.zeros(1, 1)}, expected).excess == math.inf


@pytest.mark.usefixtures("at_once")
def test_alone_it_starts_two_processes_and_writes_a_report(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {**NO_GPU, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}.items():
        monkeypatch.setenv(name, value)
    arguments = settings_of("simsiam", shards, tmp_path, "encoder.width=8", "views.size=16")
    assert main(["--images", "8", "--out", str(tmp_path / "report.json"), *arguments]) == 0
    text = (tmp_path / "report.json").read_text()
    report = json.loads(text)
    assert "Infinity" not in text
    assert (report["passed"], report["processes"], report["config"]["method"]["name"]) == (True, 2, "simsiam")
    (gradient,) = [check for check in report["checks"] if check["name"] == GRADIENT]
    assert 0 < gradient["figures"]["norm"] <= gradient["figures"]["limit"] == 1e-9
    assert [check["status"] for check in report["checks"]].count("PASS") == 10
    assert capfd.readouterr().out.splitlines()[-1] == f"PASS (report: {tmp_path / 'report.json'})"


def test_labels_that_would_end_the_run_end_the_check(shard_set: Any, tmp_path: Path) -> None:
    config = load_config(None, [*settings_of("supervised", shard_set.root, tmp_path), "method.num_classes=2"])
    with pytest.raises(UserError, match=r"method\.num_classes: expected \d+ or more"):
        list(verify(config, World()))
