"""Delays are planted that are long beside everything else, so that what bounds a run is known on any machine."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import doctor
from benchmarks.doctor import STEP, Model, Variant, apply, diagnose, fastest, main, measure_alone, variants
from benchmarks.measure import Rate
from benchmarks.stages import Training, open_loader
from pipeline.backends import BACKENDS, BackendContext
from pipeline.backends.cpu import Decoder
from pipeline.backends.pool import ThreadedBackend
from pipeline.kernels.render import render
from pipeline.loader import Loader
from sharding.command import UserError
from sharding.manifest import ShardSet
from tests.slow_storage import slow_reads
from train.config import DataConfig, load_config
from train.processes.distributed import World

SMALL = ["views.size=32", "views.kernel=7", "run.global_batch_size=8", "data.num_threads=1", "data.prefetch=1"]
SMALL += ["encoder.name=resnet18", "encoder.width=8", "method.hidden=16"]
QUICK = ["--rounds", "1", "--seconds", "0.05"]
DELAY = 0.025


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One form of the images; one thread, as OpenMP's wait for each other at length where others use the cores."""
    monkeypatch.setattr(doctor, "_FORMS", {"a short side of 40 px": ("--short-side", "40")})
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", os.preadv)  # put back afterwards
    slow_reads(DELAY)


class SlowDecoder(Decoder):
    begun = 0

    def __call__(self, *arguments: Any) -> Any:
        SlowDecoder.begun += 1
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
        training.method.register_forward_pre_hook(lambda *_: time.sleep(20 * DELAY))
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


def stages(
    v: Variant, rounds: int = 1, *, noise: float = 0.0, noisy: str = "", loader: float = 0.002, cores: float = 2.0
) -> dict[str, Any]:
    """An image costs a loader thread 2 ms, most of it decoding, and the step 1 ms of two cores; rounds differ by
    ``noise``, of all stages or of the one that is ``noisy``."""
    values: dict[str, dict[str, float]] = {
        "cores": {"cores": cores},
        "machine": {"matmul": 1e10, "copy": 1e9},
        v.stages[0]: {"seconds": loader, "cpu_seconds": loader, "reading": 1e-5, "decoding": 0.6 * loader}
        | {"resizing": 0.2 * loader, "changing colours": 0.1 * loader, "normalising": 1e-5},
        v.stages[1]: {"seconds": 0.001, "cpu_seconds": 0.002, "FLOP": 1e6, "bytes": 1e5},
        v.stages[2]: {f"{a} {b}": 1e4 for a in ("cold", "warm") for b in ("random", "sequential")},
        f"{v.name}, both": {"loader": 300, "step": 600},
    }

    def rate(name: str, value: float) -> Rate:
        return Rate(tuple(value * (1 + noise * (noisy in ("", name)) * (-1) ** i) for i in range(rounds)))

    return {n: {k: rate(n, x) for k, x in turn.items()} for n, turn in values.items()}


def variant(shard_set: ShardSet, name: str = "as it is", threads: int = 2, torch_threads: int = 2) -> Variant:
    return Variant(name, shard_set, {"backend": "cpu", "num_threads": threads, "window": None}, torch_threads)


def test_the_limits_are_those_of_the_thread_the_cores_the_step_and_storage(shard_set: ShardSet) -> None:
    v = variant(shard_set)
    limits = Model(stages(v, 1), cold=False).limits(v)
    found = {name: limit.mean for name, limit in limits.items()}
    expected = {"2 loader threads": 1000, "the cores": 500, "the training thread": 1 / 0.00101, "storage": 10000}
    assert found == pytest.approx(expected)


def test_what_loader_and_step_take_from_each_other_is_in_the_prediction(shard_set: ShardSet) -> None:
    """Images wait for the loader, which has the cores to itself while the step, that also normalises, is idle; then for
    the step."""
    v = variant(shard_set)
    found = stages(v)
    r, step = Model(found, cold=False).predicted(v).mean, 1 / (1 / 600 + 1e-5)
    assert r == pytest.approx(r / step * 300 + (1 - r / step) * 1000)
    found[f"{v.name}, both"] = {"loader": Rate((500,)), "step": Rate((450,))}
    r, step = Model(found, cold=False).predicted(v).mean, 1 / (1 / 450 + 1e-5)
    assert r == pytest.approx(r / 500 * step + (1 - r / 500) / 0.00101)


@pytest.mark.parametrize("beside", [{"loader": 1600, "step": 1000}, {"loader": 1650, "step": 5000}])
def test_no_prediction_exceeds_a_limit(beside: dict[str, float], shard_set: ShardSet) -> None:
    """On 64 cores nothing is shared but the training thread, which has to normalise as well; nor by noise."""
    v = variant(shard_set, threads=16)
    found = stages(v, loader=0.01, cores=64)
    found[v.stages[0]]["normalising"] = Rate((0.0002,))
    found[f"{v.name}, both"] = {name: Rate((rate,)) for name, rate in beside.items()}
    model = Model(found, cold=False)
    limits = {name: limit.mean for name, limit in model.limits(v).items()}
    assert limits["the training thread"] == pytest.approx(1 / (0.001 + 0.0002))
    assert model.predicted(v).mean == pytest.approx(min(limits.values()))


class Counted(Training):
    made = 0

    def alone(self, loader: Loader) -> Callable[[], int]:
        self.made += 1
        return super().alone(loader)


def test_all_variants_share_the_batches_of_one_step(shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, [*SMALL, f"data.shards={shard_set.root}"])
    monkeypatch.setattr(doctor, "_FORMS", {})
    training, found = Counted(config, shard_set, World()), variants(config, shard_set, 2.0, False, ExitStack())
    measure_alone(found, training, config, doctor._parser().parse_args(QUICK), cold=False)
    assert len(found) > 4
    assert training.made == 1


def test_variants_are_valid_on_any_machine_and_forms_lie_beside_the_shards(
    shard_set: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(None, [*SMALL, f"data.shards={shard_set.root}"])
    with ExitStack() as stack:
        found = variants(config, shard_set, 96.0, False, stack)
        form = found[-1].shards.root.parent
        assert f"{found[-1].name}: a sample is built in {form}, on the same disk" in capsys.readouterr().out
        assert form.parent == shard_set.root.parent
    for v in found:
        DataConfig.model_validate({**config.data.model_dump(), **v.data})
    assert max(v.data["num_threads"] for v in found) == 1024


def test_the_step_beside_a_loader_is_measured_while_it_loads(
    shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_decoder(monkeypatch)
    config = load_config(None, [*SMALL, f"data.shards={shard_set.root}", "data.backend=cpu"])

    seen: list[int] = []

    def step() -> int:
        time.sleep(DELAY)
        seen.append(SlowDecoder.begun)
        return 8

    with open_loader(config, shard_set) as loader:
        v = Variant("as it is", shard_set, {"prefetch": 1}, torch_threads=1)
        turn = doctor._both_turn(loader, step, v, 0.5, cold=False)
    assert seen[-1] - seen[0] > 8, "a loader that has come to its end still has a batch in the making"
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


def test_too_many_threads_are_no_fault_where_something_else_bounds_the_run(
    shard_set: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    now, fewer = variant(shard_set, threads=16), variant(shard_set, "data.num_threads=2")
    found = {**stages(now), **stages(fewer)}
    found |= {v.stages[2]: {kind: Rate((50.0,)) for kind in found[v.stages[2]]} for v in (now, fewer)}
    assert diagnose(Model(found, cold=False), now, [fewer]) == [now]
    printed = capsys.readouterr().out
    assert "reading bounds this run at 50 " in printed
    assert "oversubscribed" not in printed


def test_it_says_where_loader_and_step_hold_each_other_up(
    shard_set: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    v, line = variant(shard_set), "loader and step hold each other up: apart they would allow 500 ± inf images/s"
    for beside, said in (((200, 400), True), ((300, 600), True), ((330, 650), False)):
        found = stages(v) | {f"{v.name}, both": {"loader": Rate(beside[:1]), "step": Rate(beside[1:])}}
        diagnose(Model(found, cold=False), v, [])
        assert (line in capsys.readouterr().out) == said, beside


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


@pytest.mark.parametrize("noisy", ["cores", "both", "step"])
def test_one_noisy_quantity_is_enough_for_no_diagnosis(
    noisy: str, shard_set: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the cores, of loader and step beside each other, or of the limit, each with all else quiet."""
    v = variant(shard_set, threads=16)
    stage = {"cores": "cores", "both": f"{v.name}, both", "step": v.stages[1]}[noisy]
    model = Model(stages(v, 4, noise=0.3, noisy=stage, cores=64), cold=False)
    limit = model.limits(v)["the training thread"]
    assert model.bottleneck(v) == ("the training thread", STEP)
    cores = model.alone["cores"]["cores"]
    assert [cores.is_noisy, model.predicted(v).is_noisy, limit.is_noisy].count(True) == 1
    assert diagnose(model, v, []) == []
    assert "too noisy to say what bounds the run" in capsys.readouterr().out


def test_the_fastest_settings_are_those_measured_as_surely_faster(shard_set: ShardSet) -> None:
    now, other = variant(shard_set), variant(shard_set, "data.num_threads=4", threads=4)
    for rates, best in (((1.2, 1.21, 1.19), other), ((0.5, 1.9, 1.3), now), ((0.9, 0.91, 0.9), now)):
        runs = {"as it is": (1.0, 1.0, 1.0), "data.num_threads=4": rates}
        found = fastest([now, other], {name: {"images_per_second": Rate(rounds)} for name, rounds in runs.items()})
        assert found == best


def test_what_was_faster_and_is_no_setting_is_told(shard_set: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    now, other = variant(shard_set), variant(shard_set, "data.num_threads=4", threads=4)
    fewer = variant(shard_set, "OMP_NUM_THREADS=1", torch_threads=1)
    line = "OMP_NUM_THREADS=1, which is not a setting, was faster: x 1.80 ± 0.02"
    for threads, best, said in ((1.4, other, True), (2.0, other, False), (1.0, now, True)):
        rates = {"as it is": 1.0, other.name: threads, fewer.name: 1.8}
        spread = {name: Rate((rate, rate + 0.01, rate - 0.01)) for name, rate in rates.items() if rate > 1}
        spread |= {name: Rate((1.0, 1.0, 1.0)) for name in rates.keys() - spread.keys()}
        runs = {name: {"images_per_second": rate} for name, rate in spread.items()}
        assert fastest([now, fewer, other], runs) == best
        assert (line in capsys.readouterr().out) == said


def test_what_is_applied_is_what_was_changed(shard_set: ShardSet, tmp_path: Path) -> None:
    given, out = [*SMALL, "data.num_threads=0"], tmp_path / "tuned.yaml"
    options = doctor._parser().parse_args([*given, "--shards", str(shard_set.root), "--apply", str(out)])
    config = load_config(None, [*given, f"data.shards={shard_set.root}"])
    with ExitStack() as stack:
        now, *_ = variants(config, shard_set, 2.0, False, stack)
    apply(options, now, now)
    assert load_config(out) == config
    apply(options, doctor._with(now, backend="dali"), now)
    assert load_config(out).data == config.data.model_copy(update={"backend": "dali"})


def test_shards_behind_a_url_are_refused(shard_set: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    import fsspec

    fsspec.filesystem("memory").put(str(shard_set.root), "/doctor", recursive=True)
    assert main([*SMALL, "--shards", "memory://doctor"]) == 2
    assert "expected a local directory" in capsys.readouterr().err
