"""Two processes: they agree, or both end with a line that says why; under torchrun where its own part is tested."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sharding.command import UserError
from sharding.manifest import open_shards
from tests.census import wait_until
from tests.processes import NO_GPU, ends_of_ranks, run_ranks
from tests.train.runs import settings
from train import pretrain
from train.config import load_config
from train.engine.checkpoint import checkpoints, load
from train.engine.monitor import read_metrics
from train.processes.distributed import World

pytestmark = pytest.mark.usefixtures("at_once")

# At the third step; started again, torchrun counts.
_DIES_ONCE = """
import os, signal, sys
from train import pretrain

step = pretrain.Pretraining.__call__

def dies(self, batch, number):
    if (number, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (2, "1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, number)

pretrain.Pretraining.__call__ = dies
sys.exit(pretrain.main())
"""


def start(arguments: list[str], *options: str) -> "subprocess.Popen[str]":
    """Of what ``options`` name, -m train.pretrain or a script, two processes under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
    environment = {**os.environ, **NO_GPU, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    command = [*launcher, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def end_of(process: "subprocess.Popen[str]") -> tuple[int, list[str], str]:
    """Exit code, our own lines on the standard error, and all of it. Must end without being killed."""
    output, errors = process.communicate(timeout=300)
    lines = [line for line in errors.splitlines() if line.startswith(("train", "    train"))]
    return process.returncode, [*lines, *output.splitlines()], errors


def with_directories_of_their_own(world: World, arguments: list[str], folder: Path) -> None:
    """A whole run, and again from its first checkpoint on."""
    config = load_config(None, [*arguments, f"run.dir={folder}/{world.rank}"])
    for turn in ("whole", "continued"):
        pretrain.pretrain(config, world)
        if world.is_main:
            checkpoints(folder / "0")[-1].rename(folder / f"{turn}.pt")
            for path in checkpoints(folder / "0")[1:]:
                path.unlink()
        world.barrier()


def test_rank_0s_checkpoint_is_the_one(shards: Path, tmp_path: Path) -> None:
    """Also where a run's directory is on each node's own disk, and the others have none."""
    run_ranks(with_directories_of_their_own, 2, settings(shards, tmp_path), tmp_path)
    whole, continued = (load(tmp_path / f"{turn}.pt")["method"] for turn in ("whole", "continued"))
    assert all(torch.equal(continued[name], value) for name, value in whole.items())
    assert not (tmp_path / "1").exists()
    starts = [json.loads(line)["start_step"] for line in (tmp_path / "0" / "provenance.jsonl").read_text().splitlines()]
    assert starts == [0, 2]


DIFFERENT = {
    "run.seed=7": "run.seed: rank 0 has 0, rank 1 has 7",
    "method.temperature=0.9": "method.temperature: rank 0 has 0.5, rank 1 has 0.9",
    "optim.weight_decay=0.1": "optim.weight_decay",
}


def refusals(world: World, arguments: list[str]) -> list[str]:
    """What is said to this rank of each setting that rank 1 alone has."""
    said = []
    for other in DIFFERENT:
        try:
            pretrain.pretrain(load_config(None, [*arguments, *([other] if world.rank else [])]), world)
        except UserError as error:
            said.append(str(error))
    return said


def test_ranks_with_different_settings_are_refused(shards: Path, tmp_path: Path) -> None:
    for said in run_ranks(refusals, 2, settings(shards, tmp_path / "run")):
        for message, named in zip(said, DIFFERENT.values(), strict=True):
            assert message.startswith(f"the ranks disagree on {named}")
    assert not checkpoints(tmp_path / "run")


def test_an_error_of_one_rank_ends_both_with_a_line_each(shards: Path, tmp_path: Path) -> None:
    manifest = open_shards(shards).manifest
    copied = tmp_path / "shards"
    subprocess.run(["cp", "-r", str(shards), str(copied)], check=True)
    for shard in manifest.shards:
        if shard.lane >= 2:  # the second rank's
            (copied / shard.path).write_bytes(b"\0" * shard.num_bytes)
    arguments = settings(copied, tmp_path / "run", "data.max_replaced_samples=0")
    code, lines, errors = end_of(start(arguments, "-m", "train.pretrain"))
    assert code == 1
    assert any("[rank 1]: more than max_replaced_samples = 0" in line for line in lines), errors
    assert any("[rank 0]: stopped, because rank 1 failed: more than max_replaced" in line for line in lines), errors
    assert errors.count("Traceback (most recent call last)") == 1, "torchrun's own"


def broken(arguments: list[str], fault: Callable[..., Any]) -> int:
    """The command, with a fault in rank 1's first step."""
    if os.environ["RANK"] == "1":
        setattr(pretrain.Pretraining, "__call__", fault)  # noqa: B010
    return pretrain.main(arguments)


def raises(*_: object) -> None:
    raise KeyError("a fault of ours")


def dies(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_fault_of_ours_keeps_its_traceback(shards: Path, tmp_path: Path) -> None:
    (first, told), (second, errors) = ends_of_ranks(broken, 2, tmp_path, settings(shards, tmp_path / "run"), raises)
    assert (first, second) == (2, 1)
    assert errors.count("Traceback (most recent call last)") == errors.count("KeyError: 'a fault of ours'") == 1
    assert "[rank 0]: stopped, because rank 1 failed: 'a fault of ours' (in step 1)" in told
    assert "Traceback" not in told


def test_a_rank_that_is_killed_is_told_from_one_that_fails(shards: Path, tmp_path: Path) -> None:
    """Without torchrun, which would end the other one at once."""
    (first, told), (second, _) = ends_of_ranks(broken, 2, tmp_path, settings(shards, tmp_path / "run"), dies)
    assert (first, second) == (2, -signal.SIGKILL)
    assert "[rank 0]: stopped, because a different rank ended without saying why" in told
    assert "Traceback" not in told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_at_the_next_step(number: int, shards: Path, tmp_path: Path) -> None:
    """Which it passes on."""
    run = tmp_path / "run"
    more = ["optim.steps=100000", "run.checkpoint_every=100000", "run.log_every=1"]
    process = start(settings(shards, run, *more), "-m", "train.pretrain")
    metrics = run / "metrics.jsonl"
    wait_until(lambda: process.poll() is not None or (metrics.exists() and metrics.stat().st_size))
    process.send_signal(number)
    code, lines, errors = end_of(process)
    assert code == 1, errors
    (path,) = checkpoints(run)
    step = int(read_metrics(run)[-1]["step"])
    assert load(path)["step"] == step
    assert f"stopped at step {step} of 100000; the same command continues" in lines, errors
    assert torch.isfinite(load(path)["method"]["encoder.backbone.conv1.weight"]).all()


def pretrain_by(world: World, arguments: list[str]) -> None:
    pretrain.pretrain(load_config(None, arguments), world)


def test_a_worker_killed_under_max_restarts_changes_no_bit(shards: Path, tmp_path: Path) -> None:
    """torchrun starts both again, and the run continues from the checkpoint after step 2."""
    (tmp_path / "dies_once.py").write_text(_DIES_ONCE)
    run_ranks(pretrain_by, 2, settings(shards, tmp_path / "whole", "optim.steps=4"))
    arguments = settings(shards, tmp_path / "killed", "optim.steps=4")
    code, lines, errors = end_of(start(arguments, "--max-restarts=1", str(tmp_path / "dies_once.py")))
    assert code == 0, errors
    assert "continuing at step 2 of 4" in lines
    whole, killed = (load(checkpoints(tmp_path / name)[-1])["method"] for name in ("whole", "killed"))
    assert all(torch.equal(killed[name], value) for name, value in whole.items())
