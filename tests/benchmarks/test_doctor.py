"""Delays are planted that are long beside everything else, so that what bounds a run is known on any machine."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import doctor
from benchmarks.doctor import STEP, Model, Variant, diagnose, fastest, main, measure_alone, variants
from benchmarks.measure import Rate
from benchmarks.stages import Training, open_loader
from pipeline.backends import BACKENDS, BackendContext
from pipeline.backends.cpu import Decoder
from pipeline.backends.pool import ThreadedBackend
from pipeline.kernels.render import render
from sharding.command import UserError
from sharding.manifest import ShardSet
from train.config import load_config
from train.processes.distributed import World

SMALL = ["views.size=32", "views.kernel=7", "run.global_batch_size=8", "data.num_threads=1", "data.prefetch=1"]
SMALL += ["encoder.name=resnet18", "encoder.width=8", "method.hidden=16"]
QUICK = ["--rounds", "1", "--seconds", "0.05"]
DELAY = 0.05


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One form of the images; one thread, as OpenMP's wait for each other at length where others use the cores."""
    monkeypatch.setattr(doctor, "_FORMS", {"a short side of 40 px": ("--short-side", "40")})
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def slow(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        time.sleep(DELAY)
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", slow)


class SlowDecoder(Decoder):
    def __call__(self, *arguments: Any) -> Any:
        time.sleep(DELAY)
        return super().__call__(*arguments)


def build_slow(context: BackendContext) -> ThreadedBackend[Any]:
    return ThreadedBackend(context, SlowDecoder(), render)


def slow_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "cpu", f"{__name__}:build_slow")


@pytest.mark.parametrize("what", ["reading", "decoding", STEP])
def test_what_is_slow_is_named(what: str, shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, [*SMALL, f"data.shards={shard_set.root}"])
    training = Training(config, shard_set, World())
    monkeypatch.setattr(doctor, "_FORMS", {})
    if what == STEP:
        training.method.register_forward_pre_hook(lambda *_: time.sleep(10 * DELAY))
    else:
        {"reading": slow_disk, "decoding": slow_decoder}[what](monkeypatch)
    as_it_is, *_ = doctor.variants(config, shard_set, 2.0, False, ExitStack())
    options = doctor._parser().parse_args(QUICK)
    model = Model(measure_alone([as_it_is], training, config, options, cold=False), cold=False)
    assert model.bottleneck(as_it_is)[1] == what
    assert model.predicted(as_it_is).mean < 1 / DELAY


def test_a_slow_backend_is_diagnosed_and_the_other_is_tried_and_applied(
    shard_set: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BACKENDS, "dali", f"{__name__}:build_slow")
    out, tuned, picture = tmp_path / "results.jsonl", tmp_path / "tuned.yaml", tmp_path / "runs.png"
    more = ["--out", str(out), "--apply", str(tuned), "--picture", str(picture)]
    arguments = [*SMALL, "data.backend=dali", "--shards", str(shard_set.root), *QUICK, *more]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "decoding bounds this run at " in printed
    assert "(1 loader threads)" in printed
    head, *turns = map(json.loads, out.read_text().splitlines())
    assert head["command"].startswith("python -m benchmarks.")
    rates = {turn["contestant"]: turn["images_per_second"][0] for turn in turns if "wait_percent" in turn}
    assert min(rates, key=lambda name: rates[name]) in ("as it is", "a short side of 40 px")
    assert any("data.backend=cpu" in name for name in rates), "a cure that promises more is run"
    best = max((name for name in rates if name.startswith("data.")), key=lambda name: rates[name])
    applied = load_config(tuned)
    assert applied.data.shards == str(shard_set.root)
    for change in best.split():
        name, _, value = change.removeprefix("data.").partition("=")
        assert str(getattr(applied.data, name)) == value, best
    assert picture.exists()


def stages(v: Variant, rounds: int, *, noise: float = 0.0, loader: float = 0.002) -> dict[str, Any]:
    """An image costs a loader thread 2 ms, most of it decoding, and the step 1 ms of two cores."""
    values: dict[str, dict[str, float]] = {
        "cores": {"cores": 2.0},
        "machine": {"matmul": 1e10, "copy": 1e9},
        v.stages[0]: {"seconds": loader, "cpu_seconds": loader, "reading": 1e-5, "decoding": 0.6 * loader}
        | {"resizing": 0.2 * loader, "changing colours": 0.1 * loader, "normalising": 1e-5},
        v.stages[1]: {"seconds": 0.001, "cpu_seconds": 0.002, "FLOP": 1e6, "bytes": 1e5},
        v.stages[2]: {f"{a} {b}": 1e4 for a in ("cold", "warm") for b in ("random", "sequential")},
        f"{v.name}, both": {"loader": 400, "step": 800},
    }
    spread = [1 + noise * (-1) ** i for i in range(rounds)]
    return {n: {k: Rate(tuple(x * s for s in spread)) for k, x in turn.items()} for n, turn in values.items()}


def variant(shard_set: ShardSet, name: str = "as it is", threads: int = 2, torch_threads: int = 2) -> Variant:
    return Variant(name, shard_set, {"backend": "cpu", "num_threads": threads, "window": None}, torch_threads)


def test_the_limits_are_those_of_the_thread_the_cores_the_step_and_storage(shard_set: ShardSet) -> None:
    v = variant(shard_set)
    limits = Model(stages(v, 1), cold=False).limits(v)
    found = {name: limit.mean for name, limit in limits.items()}
    expected = {"2 loader threads": 1000, "the cores": 500, "the training thread": 1 / 0.00101, "storage": 10000}
    assert found == pytest.approx(expected)


def test_what_loader_and_step_take_from_each_other_is_in_the_prediction(shard_set: ShardSet) -> None:
    """Images wait for the loader, which has the cores to itself for ``1 - r / 800`` of the time; then for the step."""
    v = variant(shard_set)
    found = stages(v, 1)
    r = Model(found, cold=False).predicted(v).mean
    assert r == pytest.approx(r / 800 * 400 + (1 - r / 800) * 1000)
    found[f"{v.name}, both"] = {"loader": Rate((900,)), "step": Rate((450,))}
    r = Model(found, cold=False).predicted(v).mean
    assert r == pytest.approx(r / 900 * 450 + (1 - r / 900) / 0.00101)


def test_the_step_beside_a_loader_is_measured_while_it_loads(
    shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_decoder(monkeypatch)
    config = load_config(None, [*SMALL, f"data.shards={shard_set.root}", "data.backend=cpu"])

    def step() -> int:
        time.sleep(DELAY)
        return 8

    with open_loader(config, shard_set) as loader:
        v = Variant("as it is", shard_set, {"prefetch": 1}, torch_threads=1)
        turn = doctor._both_turn(loader, step, v, 0.5, cold=False)
    assert 0 < turn["loader"] < 1 / DELAY
    assert 1 / DELAY < turn["step"] < 8 / DELAY


def test_the_largest_part_of_what_is_used_up_bounds_the_run(shard_set: ShardSet) -> None:
    v = variant(shard_set)
    assert Model(stages(v, 1, loader=0.008), cold=False).bottleneck(v) == ("the cores", "decoding")
    assert Model(stages(v, 1, loader=0.001), cold=False).bottleneck(v) == ("the cores", STEP)


def test_fewer_threads_of_torch_are_always_tried(shard_set: ShardSet) -> None:
    config, before = (
        load_config(None, [f"data.shards={shard_set.root}", "run.global_batch_size=8"]),
        torch.get_num_threads(),
    )
    torch.set_num_threads(3)
    try:
        with ExitStack() as stack:
            found = variants(config, shard_set, 2.0, False, stack)
    finally:
        torch.set_num_threads(before)
    threads = {v.name: v.torch_threads for v in found if v.name.startswith("OMP")}
    on_cpu = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS=1": 1}
    assert threads == {**on_cpu, "OMP_NUM_THREADS=2": 2}


def test_too_many_threads_are_told_where_fewer_do_as_well(
    shard_set: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    now, fewer = variant(shard_set, threads=16), variant(shard_set, "data.num_threads=2")
    computing = variant(shard_set, "OMP_NUM_THREADS=1", threads=16, torch_threads=1)
    chosen = diagnose(
        Model({k: v for x in (now, fewer, computing) for k, v in stages(x, 1).items()}, cold=False),
        now,
        [fewer, computing],
    )
    printed = capsys.readouterr().out
    assert chosen == [now, fewer, computing]
    assert "oversubscribed: data.num_threads=2 would do" in printed
    assert "oversubscribed: OMP_NUM_THREADS=1 would do" in printed


def test_a_machine_that_is_too_noisy_gets_no_diagnosis_and_nothing_is_applied(
    shard_set: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    v = variant(shard_set)
    assert diagnose(Model(stages(v, 4, noise=0.01), cold=False), v, []) == [v]
    assert "bounds this run at " in capsys.readouterr().out
    assert diagnose(Model(stages(v, 4, noise=0.3), cold=False), v, []) == []
    printed = capsys.readouterr().out
    assert "too noisy to say what bounds the run" in printed
    assert "bounds this run at" not in printed
    with pytest.raises(UserError, match="nothing is written"):
        fastest([], {})


def test_the_fastest_settings_are_those_measured_as_surely_faster(shard_set: ShardSet) -> None:
    now, other = variant(shard_set), variant(shard_set, "data.num_threads=4", threads=4)
    for rates, best in (((1.2, 1.21, 1.19), other), ((0.5, 1.9, 1.3), now), ((0.9, 0.91, 0.9), now)):
        runs = {"as it is": (1.0, 1.0, 1.0), "data.num_threads=4": rates}
        found = fastest([now, other], {name: {"images_per_second": Rate(rounds)} for name, rounds in runs.items()})
        assert found == best


def test_shards_behind_a_url_are_refused(shard_set: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    import fsspec

    fsspec.filesystem("memory").put(str(shard_set.root), "/doctor", recursive=True)
    assert main([*SMALL, "--shards", "memory://doctor"]) == 2
    assert "expected a local directory" in capsys.readouterr().err
