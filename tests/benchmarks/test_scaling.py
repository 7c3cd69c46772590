import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.measure import Rate
from benchmarks.predict import Link, modelled, predict, step_seconds
from benchmarks.rank import _REPEATS, _alone, measure
from benchmarks.scaling import _show_stages, main
from pipeline.order import lanes_of_rank
from sharding.manifest import ShardSet, open_shards
from tests.processes import run_ranks
from train.config import load_config
from train.pretrain import build_loader
from train.processes.distributed import World

SMALL = ["views.size=32", "views.kernel=7", "encoder.name=resnet18", "encoder.width=8", "method.hidden=16"]
SMALL += ["method.out=8", "data.num_threads=1", "run.global_batch_size=8"]


def measured(world: World, directory: str) -> dict[str, float]:
    config = load_config(None, [*SMALL, f"data.shards={directory}"])
    shards = open_shards(directory, lanes_of_rank(4, world.rank, world.size))
    with build_loader(config, shards, world, 0) as loader:
        return measure(config, shards, loader, world, 0.01, explain=True)


def test_two_ranks_measure_every_stage_and_count_their_messages(shard_set: ShardSet) -> None:
    found, other = run_ranks(measured, 2, str(shard_set.root))
    assert {"loader", "step", "end to end", "apart", "local BatchNorm", "gradients not averaged"} <= found.keys()
    assert all(value > 0 for name, value in found.items() if name != "slowest_seconds")
    assert found["step"] == other["step"], "the slowest rank's"
    # 20 layers of BatchNorm in a ResNet-18, 2 in the projector; a message forward, one backward
    assert found["batchnorm_messages"] == 44
    channels = 8 * (1 + 4 + 5 * (2 + 4 + 8)) + 16 + 8
    assert found["batchnorm_bytes"] == 2 * 2 * 4 * channels
    assert found["gather_bytes"] == 2 * 4 * (2 * 4 * 8)  # two views of four images in 8 dimensions
    assert found["weight_bytes"] == found["gradient_bytes"], "no teacher"


class Noting(World):
    """Has a list of what is gathered, in floats."""

    def gather(self, rows: torch.Tensor, dim: int = 0) -> torch.Tensor:
        gathered.append(len(rows))
        return super().gather(rows, dim)


gathered: list[int] = []


def sent_alone(world: World) -> list[int]:
    count = {"batchnorm_messages": 2, "gather_messages": 3, "gradient_messages": 1}
    _alone({**count, "batchnorm_bytes": 8, "gather_bytes": 36, "gradient_bytes": 4}, Noting(world.rank, world.size))
    return gathered


def test_rows_are_gathered_when_their_messages_are_sent_alone() -> None:
    assert run_ranks(sent_alone, 2) == 2 * [3 * _REPEATS * [3]]


@pytest.mark.usefixtures("at_once")
def test_scaling_launches_processes_and_reports(
    shard_set: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.jsonl"
    arguments = ["--world-sizes", "1", "--rounds", "1", "--seconds", "0.01", "--predict", "--out", str(out)]
    assert main([*SMALL, "--shards", str(shard_set.root), *arguments]) == 0
    head, single = (json.loads(line) for line in out.read_text().splitlines())
    assert head["environment"]["cores"] == len(os.sched_getaffinity(0))
    assert single["contestant"] == "weak 1"
    assert min(single["loader"][0], single["step"][0], single["end to end"][0]) > 0
    printed = capsys.readouterr().out
    assert "scaling of simclr, resnet18" in printed
    assert "PREDICTED efficiency" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-sizes", "0"], "--world-sizes: expected numbers from 1"),
        (["--world-sizes", "3"], "multiple of the 3 processes, found 8"),
        (["--rounds", "0"], "--rounds >= 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(
    arguments: list[str], message: str, shard_set: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--shards", str(shard_set.root), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("at_once")
def test_an_error_of_a_process_is_told_in_one_line(shard_set: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run.init_from=/nowhere", "--shards", str(shard_set.root), "--world-sizes", "1"]
    assert main([*SMALL, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks.scaling: weak 1: run.init_from: ")
    assert error.count("\n") == 1


def turn(**values: float) -> dict[str, Any]:
    rates = {"loader": 500.0, "step": 100.0, "end to end": 100.0, "apart": 160.0, "batch": 16.0, "size": 2.0}
    rates |= {"local BatchNorm": 125.0, "gradients not averaged": 110.0, "slowest_seconds": 0.005}
    sent: dict[str, float] = {
        "batchnorm_messages": 40,
        "batchnorm_bytes": 8000,
        "gather_messages": 2,
        "gather_bytes": 4000,
    }
    sent |= {"gradient_messages": 1, "gradient_bytes": 10e6, "latency_seconds": 2e-4, "gradient_seconds": 0.0102}
    seconds = {"batchnorm_seconds": 0.008, "gather_seconds": 0.0004}
    return {name: Rate((float(value),)) for name, value in {**rates, **sent, **seconds, **values}.items()}


def test_the_stages_are_differences_of_a_steps_milliseconds(capsys: pytest.CaptureFixture[str]) -> None:
    _show_stages("weak 2", turn(), {"batch": Rate((8.0,)), "step": Rate((80.0,))})
    printed = capsys.readouterr().out
    for label, milliseconds in {
        "the step of a single process": 100,
        "apart": 100,
        "the whole step": 160,
        "what BatchNorm's collectives cost": 32,
        "the slowest rank": 5,
        "40 messages of 0.2 kB": 8,
    }.items():
        row = next(row for row in printed.splitlines() if label in row)
        assert f"{milliseconds} ± inf" in row, row


SENT = {"batchnorm_messages": 40, "batchnorm_bytes": 8000, "gather_messages": 2, "gather_bytes": 4000}


def test_the_model_adds_up_latencies_and_bytes() -> None:
    link = Link(latency_seconds=1e-5, bytes_per_second=1e9)
    sent = {**SENT, "gradient_bytes": 1e8}
    hops = math.log2(8) * 1e-5
    norms = 20 * hops + 7 * 4000 / 1e9 + 20 * 2 * hops + 2 * 7 / 8 * 4000 / 1e9
    rows = 2 * (hops + 7 * 2000 / 1e9)
    gradients = 2 * hops + 2 * 7 / 8 * 0.1
    assert step_seconds(1.0, sent, link, 8, 0.0) == pytest.approx(1 + norms + rows + gradients)
    assert step_seconds(1.0, sent, link, 8, 2 / 3) == pytest.approx(1 + norms + rows), "hidden behind the backward pass"
    halved = step_seconds(1.0, sent, link, 8, 0.05, gradient_share=0.5, batchnorm_share=0)
    assert halved == pytest.approx(1 + rows + 2 * hops + 7 / 8 * 0.1 - 0.05), "half of the bytes, all of the latency"
    pieces = step_seconds(1.0, sent, link, 8, 0.05, every=4)
    assert pieces == pytest.approx((4 + 4 * (norms + rows) + gradients - 0.05) / 4)


def test_efficiencies_of_averaging_seldom_are_those_of_the_loop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step of 0.1 s and 1 GB of gradients, 0.158 s over this link on 64 GPUs: weights, with a teacher twice as many,
    are averaged after the update; of four pieces the last averages,
    and 0.067 s of it hide on a GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    nothing = {f"{what}_{unit}": 0.0 for what in ("batchnorm", "gather") for unit in ("messages", "bytes")}
    sent = {**nothing, "batch": 10.0, "step": 100.0, "gradient_bytes": 1e9}
    for weight_bytes, averaged in ((1e9, 0.1 / (0.1 + 0.1576 / 4)), (2e9, 0.1 / (0.1 + 0.3151 / 4))):
        turn = {name: Rate((value,)) for name, value in {**sent, "weight_bytes": weight_bytes}.items()}
        predict({"weak 1": turn}, Link(1e-5, 12.5e9))
        printed = capsys.readouterr().out
        assert "averaging 1e+03 MB hides behind 67% of the step" in " ".join(printed.split())
        rows = {name: row for row in printed.splitlines() for name in ("weights", "accumulated") if name in row}
        assert f"{averaged:.3f}" in rows["weights"], rows
        assert f"{0.1 / (0.1 + (0.1576 - 0.0667) / 4):.3f}" in rows["accumulated"], rows


def test_one_process_sends_nothing_and_more_send_more() -> None:
    sent, link = {**SENT, "gradient_bytes": 1e8}, Link(1e-5, 25e9)
    steps = [step_seconds(0.1, sent, link, size, 2 / 3) for size in (1, 8, 64, 512, 4096)]
    assert steps[0] == 0.1
    assert steps == sorted(steps)


def test_the_model_of_this_machine_takes_its_link_from_messages_alone() -> None:
    """Two processes: 10 MB in 10 ms beside the latency; 0.1 s apart, 20 + 20 + 1 + 1 messages of BatchNorm and rows."""
    predicted = modelled(turn(), overlap=0.0).mean
    latencies = (20 + 2 * 20 + 1 + 1 + 2) * 1e-4
    num_bytes = 4000 + 4000 + 2 * 2000
    assert predicted == pytest.approx(0.1 + latencies + num_bytes / 1e9 + 0.01)
