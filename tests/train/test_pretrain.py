"""Whole runs: exact resume after kill -9, the same curve on any number of processes, clear refusals."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch

from sharding.build import main as build_shards
from sharding.manifest import open_shards
from tests.census import wait_until
from tests.processes import run_ranks, start_command
from tests.train.runs import settings, settings_of
from train.config import load_config
from train.engine.automatic import dtype
from train.engine.checkpoint import checkpoints, load, step_of
from train.engine.monitor import read_metrics
from train.engine.plan import check_batch, plan_run
from train.evaluate.__main__ import main as evaluate
from train.model.encoder import Encoder
from train.pretrain import build, main, pretrain
from train.processes.distributed import World


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run)]


def run_alone(shards: Path, run: Path, *more: str) -> list[float]:
    pretrain(load_config(None, settings(shards, run, *more)), World())
    return losses(run)


def pretrain_as_rank(world: World, arguments: list[str]) -> None:
    pretrain(load_config(None, arguments), world)


@pytest.fixture(scope="module")
def reference(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of six uninterrupted steps in one process."""
    return run_alone(shards, tmp_path_factory.mktemp("reference") / "run")


def test_a_killed_run_continues_exactly(shards: Path, reference: list[float], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_command(main, tmp_path / "said.txt", settings(shards, run))
    wait_until(lambda: checkpoints(run) or not process.is_alive())
    process.kill()
    process.join()
    assert process.exitcode in (-signal.SIGKILL, 0), "0: it was done before this process had its turn"
    for path in checkpoints(run)[1:]:
        path.unlink()
    assert run_alone(shards, run) == reference


def test_two_processes_follow_the_curve_of_one_and_one_continues_them(
    shards: Path, reference: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_ranks(pretrain_as_rank, 2, settings(shards, run))
    assert losses(run) == pytest.approx(reference, rel=2e-3)
    for path in checkpoints(run)[1:]:
        path.unlink()
    assert run_alone(shards, run)[4:] == pytest.approx(reference[4:], rel=2e-3)


def test_another_backend_gives_the_same_curve(shards: Path, reference: list[float], tmp_path: Path) -> None:
    found = run_alone(shards, tmp_path / "run", "data.backend=torchvision", "data.num_threads=2", "data.prefetch=1")
    assert found == pytest.approx(reference, rel=5e-3)


def test_saving_and_measuring_are_pauses(shards: Path, tmp_path: Path) -> None:
    run_alone(shards, tmp_path / "run", "optim.steps=4", "run.log_every=2", "run.checkpoint_every=3")
    first, second = read_metrics(tmp_path / "run")
    assert first["pause_seconds"] > 0, "its own measuring"
    assert second["pause_seconds"] > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_at_the_next_step_and_the_same_command_continues(
    shards: Path, tmp_path: Path, number: int
) -> None:
    run = tmp_path / "run"
    more = ["optim.steps=100000", "run.checkpoint_every=100000", "run.log_every=100000"]
    process = start_command(main, tmp_path / "said.txt", settings(shards, run, *more))
    wait_until(lambda: (run / "metrics.jsonl").exists() or not process.is_alive())
    os.kill(process.pid or 0, number)
    process.join(timeout=300)
    output = (tmp_path / "said.txt").read_text()
    assert process.exitcode == 3, output
    (path,) = checkpoints(run)
    step = step_of(path)
    assert step < 100000
    assert read_metrics(run)[-1]["step"] == step, "the interval that was cut short is logged"
    assert f"stopped at step {step} of 100000; the same command continues" in output
    assert main(settings(shards, run, f"optim.steps={step + 1}")) == 0
    assert step_of(checkpoints(run)[-1]) == step + 1


def test_a_run_that_is_done_already_says_so(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(settings(shards, run, "optim.steps=2")) == 0
    assert main(settings(shards, run, "optim.steps=1")) == 0
    assert "step 2 is done, and the run is to have 1; nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(("piece", "said"), [(12, True), (24, False)])
def test_a_run_says_that_batchnorm_sees_pieces(
    piece: int, said: bool, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(settings(shards, tmp_path / "run", "optim.steps=1", f"run.micro_batch_size={piece}")) == 0
    assert (f"BatchNorm has the statistics of pieces of {piece} images" in capsys.readouterr().out) == said


def test_optimizer_settings_changed_on_resume_are_used_and_said(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(settings(shards, run, "optim.steps=2")) == 0
    assert main(settings(shards, run, "optim.steps=4", "optim.weight_decay=0.5", "optim.momentum=0.1")) == 0
    output = capsys.readouterr().out
    assert "from here on optim.weight_decay: 1e-06 -> 0.5" in output
    state = load(checkpoints(run)[-1])
    group = state["optimizer"]["param_groups"][0]
    assert (group["weight_decay"], group["momentum"]) == (0.5, 0.1)
    assert state["config"]["optim"]["weight_decay"] == 0.5
    assert main(settings(shards, run, "optim.steps=6", "optim.name=lars")) == 2
    assert "made with a different optim.name: expected lars, found sgd" in capsys.readouterr().err


def test_a_run_that_diverges_names_step_and_checkpoint(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    settled = settings(shards, run, "optim.steps=40", "run.checkpoint_every=1", "run.log_every=10")
    assert main([*settled, "optim.learning_rate=1e12"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"gradient norm became NaN or infinite at step \d+.*" + re.escape(str(run)), error) or (
        "values that are not finite" in error
    )
    for path in checkpoints(run):
        tensors = load(path)["method"].values()
        assert all(torch.isfinite(tensor).all() for tensor in tensors if tensor.is_floating_point())


def test_a_finished_run_is_evaluated(
    shards: Path, reference: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert run_alone(shards, run, "optim.steps=2") == pytest.approx(reference[:2], rel=0.5)
    assert evaluate(["--checkpoint", str(run), "--untrained", "knn.k=5"]) == 0
    output = capsys.readouterr().out
    assert "pretrained" in output
    assert "untrained" in output
    assert (run / "evaluation.jsonl").exists()
    assert evaluate(["--checkpoint", str(run), "--test", str(shards)]) == 2
    assert "found the same, so that every image would be its own" in capsys.readouterr().err
    assert evaluate(["--checkpoint", str(tmp_path / "absent")]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.epoch=3"], "did you mean 'epochs'"),
        (["method.temperature=warm"], "method.temperature"),
        (["run.global_batch_size=26"], "multiple of the 4 lanes"),
        (["data.shards=/nonexistent"], "/nonexistent"),
        (["data.backend=magic"], "data.backend"),
    ],
)
def test_bad_settings_are_refused(
    shards: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main([*settings(shards, run), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not run.exists()


def batch_error(world: World, arguments: list[str]) -> str:
    try:
        pretrain(load_config(None, arguments), world)
    except ValueError as error:
        return str(error)
    return ""


def test_a_batch_that_the_world_does_not_divide_is_refused(shards: Path, tmp_path: Path) -> None:
    arguments = settings(shards, tmp_path / "run", "run.global_batch_size=28")
    for error in run_ranks(batch_error, 3, arguments):
        assert "run.global_batch_size: expected a multiple of the 3 processes, found 28" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("batch", "warned"), [(48, False), (52, True)])
def test_a_batch_of_more_than_half_of_the_images_is_warned_of(
    shards: Path, batch: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = open_shards(shards).manifest
    check_batch(load_config(None, [f"run.global_batch_size={batch}"]), manifest, 1)
    assert ("more than half of the 96 images" in caplog.text) == warned


def test_a_checkpoint_of_other_data_is_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sharding.demo import load_demo

    load_demo("train", num_images=48, seed=1).to_parquet(tmp_path / "images" / "train-00000-of-00001.parquet")
    other = tmp_path / "other"
    assert build_shards(["--dataset", str(tmp_path / "images"), "--out", str(other), "--lanes", "4"]) == 0
    run = tmp_path / "run"
    run_alone(other, run, "optim.steps=1")
    before = (run / "metrics.jsonl").read_text()
    assert main(settings(shards, run)) == 2
    assert "data set (fingerprint of data.shards)" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("name", ["byol", "mocov2", "dino"])
def test_a_teacher_begins_as_its_student_does_with_the_weights_that_are_given(
    name: str, shards: Path, tmp_path: Path
) -> None:
    arguments = settings_of(name, shards, tmp_path / "run", f"run.init_from={tmp_path / 'encoder.pt'}")
    config = load_config(None, arguments)
    weights = Encoder(config.encoder).backbone.state_dict()
    torch.save(weights, tmp_path / "encoder.pt")
    method = build(config, World())
    for encoder in (method.encoder, method.exported()):
        assert all(torch.equal(value, weights[key]) for key, value in encoder.backbone.state_dict().items())
    for teacher, student in method.teachers():
        pairs = zip(teacher.state_dict().values(), student.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("name", "setting"), [("simclr", "run.init_from={}"), ("distill", "method.weights={}")])
def test_a_run_continues_without_the_file_that_it_began_with(
    name: str, setting: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "encoder.pt"
    arguments = [*settings_of(name, shards, tmp_path / "run", setting.format(file)), "optim.steps=1"]
    config = load_config(None, arguments)
    torch.save(Encoder(config.encoder).backbone.state_dict(), file)
    assert main(arguments) == 0
    file.unlink()
    assert main([*arguments, "optim.steps=2"]) == 0
    assert main([*arguments, f"run.dir={tmp_path / 'other'}"]) == 2
    assert f"{setting.partition('=')[0]}: {file}: cannot be read" in capsys.readouterr().err


def test_epochs_become_steps(shards: Path) -> None:
    manifest = open_shards(shards).manifest
    plan = plan_run(load_config(None, ["run.global_batch_size=24", "optim.epochs=10.1"]), manifest.num_samples)
    assert (plan.total_steps, plan.warmup_steps) == (41, 40)
    assert plan_run(load_config(None, ["optim.steps=50"]), manifest.num_samples).warmup_steps == 2


def test_precision_is_chosen_by_the_device() -> None:
    automatic, forced = load_config(), load_config(None, ["run.precision=bf16"])
    assert dtype(automatic, World()) == torch.float32
    assert dtype(automatic, World(device=torch.device("cuda"))) == torch.bfloat16
    assert dtype(forced, World()) == torch.bfloat16


def test_interrupted_writes_leave_nothing_half_done(shards: Path, tmp_path: Path) -> None:
    """A stray temporary file of a killed save is neither loaded nor in the way."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "step-000000002.tmp").write_bytes(b"half")
    run_alone(shards, run, "optim.steps=2")
    assert [path.name for path in checkpoints(run)] == ["step-000000002.pt"]
    assert not os.path.lexists(run / "step-000000002.tmp")
