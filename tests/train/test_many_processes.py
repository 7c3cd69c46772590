"""Two processes under torchrun: they agree, or both end with a line that says why."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from sharding.manifest import open_shards
from tests.census import wait_until
from tests.processes import NO_GPU
from tests.train.runs import settings
from train.engine.checkpoint import checkpoints, load
from train.engine.monitor import read_metrics

_SCRIPT = """
import os, sys
from train import pretrain
own = [a.removeprefix(f"{os.environ['RANK']}:") for a in sys.argv[1:] if a.startswith((f"{os.environ['RANK']}:"))]
everyones = [a for a in sys.argv[1:] if a[1] != ":"]
if "fail" in own:
    def broken(*_):
        raise KeyError("a fault of ours")
    pretrain.Pretraining.__call__ = broken
    own.remove("fail")
if "die once" in own:  # at the third step; started again, torchrun counts
    import signal
    step = pretrain.Pretraining.__call__
    def dies(self, batch, number):
        if number == 2 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch, number)
    pretrain.Pretraining.__call__ = dies
    own.remove("die once")
if "die" in own:
    import signal
    pretrain.Pretraining.__call__ = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    own.remove("die")
sys.exit(pretrain.main([*everyones, *own]))
"""


def start(folder: Path, arguments: list[str], *options: str) -> "subprocess.Popen[str]":
    script = folder / "script.py"
    script.write_text(_SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *options]
    environment = {**os.environ, **NO_GPU, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    return subprocess.Popen(
        [*launcher, str(script), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def end_of(process: "subprocess.Popen[str]") -> tuple[int, list[str], str]:
    """Exit code, our own lines on the standard error, and all of it. Must end without being killed."""
    output, errors = process.communicate(timeout=300)
    lines = [line for line in errors.splitlines() if line.startswith(("train", "    train"))]
    return process.returncode, [*lines, *output.splitlines()], errors


def test_rank_0s_checkpoint_is_the_one(shards: Path, tmp_path: Path) -> None:
    """Also where a run's directory is on each node's own disk, and the others have none."""
    own = [f"0:run.dir={tmp_path}/a", f"1:run.dir={tmp_path}/b"]
    arguments = [*(a for a in settings(shards, tmp_path) if not a.startswith("run.dir")), *own]
    last: list[dict[str, torch.Tensor]] = []
    for _ in range(2):
        code, _, errors = end_of(start(tmp_path, arguments))
        assert code == 0, errors
        last.append(load(checkpoints(tmp_path / "a")[-1])["method"])
        for path in checkpoints(tmp_path / "a")[1:]:
            path.unlink()
    assert all(torch.equal(last[1][name], value) for name, value in last[0].items())
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ("run.seed=7", "run.seed: rank 0 has 0, rank 1 has 7"),
        ("method.temperature=0.9", "method.temperature: rank 0 has 0.5, rank 1 has 0.9"),
        ("optim.weight_decay=0.1", "optim.weight_decay"),
    ],
)
def test_ranks_with_different_settings_are_refused(
    shards: Path,
    tmp_path: Path,
    other: str,
    named: str,
) -> None:
    code, lines, errors = end_of(start(tmp_path, [*settings(shards, tmp_path / "run"), f"1:{other}"]))
    assert code == 1, errors  # torchrun's own
    for rank in (0, 1):
        assert any(f"[rank {rank}]: the ranks disagree on {named}" in line for line in lines), errors
    assert not checkpoints(tmp_path / "run")


def test_an_error_of_one_rank_ends_both_with_a_line_each(shards: Path, tmp_path: Path) -> None:
    manifest = open_shards(shards).manifest
    copied = tmp_path / "shards"
    subprocess.run(["cp", "-r", str(shards), str(copied)], check=True)
    for shard in manifest.shards:
        if shard.lane >= 2:  # the second rank's
            (copied / shard.path).write_bytes(b"\0" * shard.num_bytes)
    arguments = settings(copied, tmp_path / "run", "data.max_replaced_samples=0")
    code, lines, errors = end_of(start(tmp_path, arguments))
    assert code == 1
    assert any("[rank 1]: more than max_replaced_samples = 0" in line for line in lines), errors
    assert any("[rank 0]: stopped, because rank 1 failed: more than max_replaced" in line for line in lines), errors
    assert errors.count("Traceback (most recent call last)") == 1, "torchrun's own"


def test_a_fault_of_ours_keeps_its_traceback(shards: Path, tmp_path: Path) -> None:
    code, lines, errors = end_of(start(tmp_path, [*settings(shards, tmp_path / "run"), "1:fail"]))
    assert code == 1
    assert errors.count("KeyError: 'a fault of ours'") == 1
    told = "[rank 0]: stopped, because rank 1 failed: 'a fault of ours' (in step 1)"
    assert any(told in line for line in lines), errors


def test_a_rank_that_is_killed_is_told_from_one_that_fails(shards: Path, tmp_path: Path) -> None:
    """Without torchrun, which would end the other one at once."""
    (tmp_path / "script.py").write_text(_SCRIPT)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    command = [sys.executable, str(tmp_path / "script.py"), *settings(shards, tmp_path / "run"), "1:die"]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **NO_GPU, **meeting, "PYTHONPATH": str(Path.cwd()), "WORLD_SIZE": "2", "RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    code, _, errors = end_of(ranks[0])
    assert (code, end_of(ranks[1])[0]) == (2, -signal.SIGKILL)
    assert "[rank 0]: stopped, because a different rank ended without saying why" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_at_the_next_step(
    shards: Path,
    tmp_path: Path,
    number: int,
) -> None:
    run = tmp_path / "run"
    more = ["optim.steps=100000", "run.checkpoint_every=100000", "run.log_every=1"]
    process = start(tmp_path, settings(shards, run, *more))
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


def test_a_worker_killed_under_max_restarts_changes_no_bit(shards: Path, tmp_path: Path) -> None:
    """torchrun starts both again, and the run continues from the checkpoint after step 2."""
    last = []
    for name, own in (("whole", []), ("killed", ["1:die once"])):
        process = start(tmp_path, [*settings(shards, tmp_path / name, "optim.steps=4"), *own], "--max-restarts=1")
        code, lines, errors = end_of(process)
        assert code == 0, errors
        assert ("continuing at step 2 of 4" in lines) == (name == "killed")
        last.append(load(checkpoints(tmp_path / name)[-1])["method"])
    assert all(torch.equal(last[1][name], value) for name, value in last[0].items())
