from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from benchmarks.parity import Difference, compare, main
from pipeline.backends import BACKENDS, Backend, BackendOptions, Pending, Views
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

        def result(self) -> Views:
            return [(view.int() + self.levels).clamp(0, 255).byte() for view in self.batch.result()]


def build_shifted(options: BackendOptions) -> Shifted:
    return Shifted(build(options), levels=2)


def test_the_fast_backends_keep_the_tolerances_on_generated_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--images", "4"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in ("cpu", "dali", "hue", "blur", "simclr", "dino", "eval"))


def test_over_tolerance_is_an_exit_code(
    shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BACKENDS, "shifted", "tests.benchmarks.test_parity:build_shifted")
    assert main(["--shards", str(shard_set.root), "--images", "2", "--backends", "shifted"]) == 1
    assert "over" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--images", "0"], ["--shards", "nowhere"]])
def test_bad_input_is_one_message(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--backends", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("benchmarks.parity: ")


def test_a_damaged_sample_is_named(damage: Callable[[int], ShardSet], capsys: pytest.CaptureFixture[str]) -> None:
    shards = damage(91)
    assert main(["--shards", str(shards.root), "--images", "2", "--backends", "cpu"]) == 2
    assert "parity: sample 91 (lane-03/" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("difference", "tolerance", "over"),
    [
        (Difference(0.4, 1.0, 9), 0.5, False),
        (Difference(0.6, 1.0, 9), 0.5, True),
        (Difference(0.4, 3.1, 9), 0.5, True),
    ],
)
def test_tolerances(difference: Difference, tolerance: float, over: bool) -> None:
    assert difference.exceeds(tolerance) is over


def test_compare_averages_images_of_all_views() -> None:
    views = [torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(2, 2, 2, 3, dtype=torch.uint8)]
    references = [np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 2, 2, 3), np.uint8)]
    references[1][1] = 200
    assert compare(views, references) == Difference(50.0, 200.0, 200)
