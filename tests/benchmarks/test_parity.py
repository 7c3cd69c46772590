import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from benchmarks.parity import Difference, compare, main
from pipeline.backends import BACKENDS, Backend, BackendContext, Pending, Views
from pipeline.backends.cpu import build
from pipeline.plan import BatchPlan
from sharding.manifest import ShardSet


@dataclass
class Shifted:
    """The cpu backend, its views brighter by some levels."""

    backend: Backend
    levels: int

    def submit(self, plan: BatchPlan) -> "Shifted.Batch":
        return Shifted.Batch(self.backend.submit(plan), self.levels)

    def close(self) -> None:
        self.backend.close()

    @dataclass
    class Batch:
        batch: Pending
        levels: int

        def done(self) -> bool:
            return self.batch.done()

        def result(self, timeout: float | None = None) -> Views:
            return [(view.int() + self.levels).clamp(0, 255).byte() for view in self.batch.result(timeout)]


def build_shifted(context: BackendContext) -> Shifted:
    return Shifted(build(context), levels=2)


def test_the_fast_backends_keep_the_tolerances(capsys: pytest.CaptureFixture[str]) -> None:
    """On generated images of several sizes and both kinds of chroma."""
    assert main(["--images", "3"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in ("cpu", "dali", "hue", "blur", "simclr", "dino", "eval"))


def test_over_tolerance_is_an_exit_code(
    shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BACKENDS, "shifted", "tests.benchmarks.test_parity:build_shifted")
    assert main(["--shards", str(shard_set.root), "--images", "2", "--backends", "shifted"]) == 1
    assert "over" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--images", "0", "--shards", "."], ["--shards", "nowhere"]])
def test_bad_input_is_one_message(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--backends", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("benchmarks.parity: ")


def test_a_damaged_sample_is_named(damage: Callable[[int], ShardSet], capsys: pytest.CaptureFixture[str]) -> None:
    shards = damage(91)
    assert main(["--shards", str(shards.root), "--images", "2", "--backends", "cpu"]) == 2
    assert re.match("benchmarks.parity: .*sample 91 \\(lane-03/.*sharding.verify", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("images", "over"), [((0.4,), False), ((0.6,), True), ((0.1, 0.2, 0.8), False), ((0.0,) * 9 + (3.1,), True)]
)
def test_tolerances_are_of_the_mean_and_of_the_worst_image(images: tuple[float, ...], over: bool) -> None:
    assert Difference(images, 9).exceeds(0.5) is over


def test_compare_takes_the_mean_of_each_view_of_each_image() -> None:
    views = [torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2)]
    references = [torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2)]
    references[1][1] = 200
    found = compare(views, references) + compare(views[:1], [references[0] + 1])
    assert found == Difference((0, 0, 0, 200, 1, 1), 200)
    assert found.mean == pytest.approx(202 / 6)
