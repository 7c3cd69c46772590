import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from benchmarks.measure import Rate, rate_of
from benchmarks.stages import load, open_loader, parse
from benchmarks.throughput import _parser, _verdict, main
from pipeline.backends import BACKENDS, BackendContext, Pending, Views
from pipeline.backends.cpu import build
from pipeline.plan import BatchPlan
from sharding.manifest import ShardSet
from train.config import load_config

QUICK = ["--rounds", "2", "--seconds", "0.05", "--threads", "1"]
SMALL = ["views.size=32", "views.kernel=7", "run.global_batch_size=8", "data.num_threads=1"]
NETWORK = ["encoder.name=resnet18", "encoder.width=8", "method.hidden=16"]


def test_compares_backends_and_peers_and_saves_every_round(
    shard_set: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "results.jsonl", tmp_path / "results.png"
    contestants = ["--backends", "cpu", "synthetic", "--peers", "decode-only", "dali-native", "--loaders-only"]
    more = ["--out", str(out), "--picture", str(picture)]
    assert main([*SMALL, "--shards", str(shard_set.root), *QUICK, *contestants, *more]) == 0
    _, *turns = (json.loads(line) for line in out.read_text().splitlines())
    names = [turn["contestant"] for turn in turns]
    assert names == [f"{name}, 1 thread" for name in ("decode-only", "dali-native", "cpu", "synthetic")]
    for turn in turns:
        assert len(turn["images_per_second"]) == len(turn["cpu_percent"]) == 2
        assert min(turn["images_per_second"]) > 0
    printed = capsys.readouterr().out
    assert "8 of 92 samples a batch" in printed
    assert "peer: dali-native, 1 thread; decoding: decode-only, 1 thread" in printed
    assert picture.exists()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """OpenMP's threads wait for each other at length where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", ["simclr", "byol"])
def test_gives_the_three_numbers_of_any_run(
    method: str, shard_set: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.jsonl"
    arguments = [f"method.name={method}", *SMALL, *NETWORK, "--backends", "cpu", "--peers", "--out", str(out)]
    assert main([*arguments, "--shards", str(shard_set.root), *QUICK]) == 0
    turns = {turn["contestant"]: turn for turn in map(json.loads, out.read_text().splitlines()[1:])}
    assert list(turns) == ["cpu, 1 thread", "loader alone", "step alone", "end to end"]
    assert all(0 <= percent <= 100 for percent in turns["end to end"]["wait_percent"])
    printed = capsys.readouterr().out
    assert f"a run of {method}, resnet18, 8 images" in printed
    assert "end to end the step waits for data " in printed


class Slowed:
    """The cpu backend, each batch made five times."""

    def __init__(self, context: BackendContext) -> None:
        self._backend = build(context)
        self.stats, self.close = self._backend.stats, self._backend.close

    def submit(self, plan: BatchPlan) -> "Slowed.Batch":
        return Slowed.Batch([self._backend.submit(plan) for _ in range(5)])

    class Batch:
        def __init__(self, batches: list[Pending]) -> None:
            self._batches = batches

        def done(self) -> bool:
            return all(batch.done() for batch in self._batches)

        def result(self, timeout: float | None = None) -> Views:
            return [batch.result(timeout) for batch in self._batches][-1]


def test_a_backend_that_does_more_work_shows_in_the_ranking(
    shard_set: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By images per second of CPU time, which other work on the machine changes little."""
    monkeypatch.setitem(BACKENDS, "slowed", "tests.benchmarks.test_throughput:Slowed")
    out = tmp_path / "results.jsonl"
    arguments = ["--backends", "slowed", "cpu", "--peers", "--loaders-only", "--rounds", "3", "--seconds", "0.5"]
    small = [*SMALL, "views.size=96", "run.global_batch_size=32", "--threads", "1", "--out", str(out)]
    assert main([*small, "--shards", str(shard_set.root), *arguments]) == 0
    slowed, cpu = (json.loads(line) for line in out.read_text().splitlines()[1:])
    rates = [sum(t["images_per_second"]) / sum(t["cpu_percent"]) for t in (slowed, cpu)]
    assert rates[1] > 2 * rates[0]
    printed = capsys.readouterr().out
    assert printed.index("cpu, 1 thread") < printed.index("slowed, 1 thread")


class Noting:
    """The cpu backend, which notes when it delivers how many images."""

    delivered: ClassVar[list[tuple[float, int]]] = []

    def __init__(self, context: BackendContext) -> None:
        self._backend = build(context)
        self.stats, self.close = self._backend.stats, self._backend.close

    def submit(self, plan: BatchPlan) -> "Noting.Batch":
        return Noting.Batch(self._backend.submit(plan))

    class Batch:
        def __init__(self, batch: Pending) -> None:
            self._batch, self.done = batch, batch.done

        def result(self, timeout: float | None = None) -> Views:
            views = self._batch.result(timeout)
            Noting.delivered.append((time.perf_counter(), len(views[0])))
            return views


def test_images_per_second_agree_with_what_the_backend_delivered(
    shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "cpu", "tests.benchmarks.test_throughput:Noting")
    config, moments = load_config(None, [*SMALL, f"data.shards={shard_set.root}", "data.backend=cpu"]), list[float]()
    with open_loader(config, shard_set) as loader:
        turn = rate_of(partial(load, loader), 1.0, 20, lambda: moments.append(time.perf_counter()))
    begin, end = moments
    images = sum(rows for moment, rows in Noting.delivered if begin < moment < end)
    assert images == pytest.approx(turn["images_per_second"] * (end - begin), rel=0.05)
    assert images == sum(rows for _, rows in Noting.delivered) - 20 * 8, "all but those of the warm-up"


def test_overrides_may_stand_behind_options_with_several_values() -> None:
    options = parse(
        _parser(), ["--threads", "1", "2", "views.0.size=96", "--peers", "method.name=byol", "--rounds", "3"]
    )
    assert (options.threads, options.peers, options.rounds) == ([1, 2], [], 3)
    assert options.overrides == ["views.0.size=96", "method.name=byol"]


def test_the_verdict_names_a_winner_only_where_there_is_one() -> None:
    assert _verdict("a", "b", Rate((1.2, 1.21, 1.19))).startswith("a is 1.2 ± 0.025 times as fast as b")
    assert _verdict("a", "b", Rate((0.9, 1.4, 1.1))) == "a and b cannot be told apart: ratio 1.133 ± 0.63"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shards", "/nowhere"], "/nowhere: no such directory"),
        (["--shards", "memory://nowhere"], "memory://nowhere: no such directory"),
        (["run.global_batch_size=6"], "multiple of the 4 lanes"),
        (["--rounds", "0"], "--rounds >= 1"),
        (["--seconds", "0"], "--seconds > 0"),
        (["views.size=8", "views.kernel=23"], "views.0: kernel: half of 23"),
        (["method.name=magic"], "method.name: unknown method 'magic'"),
    ],
    ids=["shards", "url", "batch", "rounds", "seconds", "size", "method"],
)
def test_wrong_arguments_are_one_clear_message(
    shard_set: ShardSet, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main([*SMALL, "--shards", str(shard_set.root), *QUICK, "--backends", "cpu", "--peers", *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks.throughput: ")
    assert message in error
