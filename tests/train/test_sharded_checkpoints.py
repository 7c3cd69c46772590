"""Checkpoints of which each process writes its own shards: the same state as in a file, and as safe."""

import itertools
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.multiprocessing.spawn import ProcessExitedException

from sharding.command import UserError
from tests.processes import run_ranks
from tests.train.runs import settings_of
from tests.train.test_strategies import same
from train.config import load_config
from train.engine import checkpoint
from train.engine.checkpoint import CheckpointError, checkpoints, load, load_latest, load_pretrained, step_of
from train.engine.plan import RunPlan
from train.overrides import ConfigError
from train.pretrain import Pretraining, build, optimizer_of, pretrain
from train.processes.distributed import World
from train.processes.fsdp import local

SETTINGS = ["optim.name=adamw", "optim.steps=4", "run.precision=fp64", "run.checkpoint_every=1"]
VIT = [
    "views.size=32",
    "encoder.name=timm:test_vit",
    "encoder.image_size=32",
    "encoder.stem=imagenet",
    "encoder.width=64",
]
KEPT = ["run.keep_checkpoints=1", "run.keep_every=2"]
FSDP = ["run.parallel=fsdp"]
SHARDED = [*FSDP, "run.sharded_checkpoints=true"]
WEIGHT, TOKEN = "encoder.backbone.patch_embed.proj.weight", "encoder.backbone.cls_token"
FILES = [".metadata", "__0_0.distcp", "__1_0.distcp", "state.pt"]


def arguments_of(shards: Path, run: Path, *more: str) -> list[str]:
    return settings_of("byol", shards, run, *SETTINGS, *VIT, *KEPT, *more)


def trained(world: World, runs: list[list[str]]) -> list[str]:
    for arguments in runs:
        pretrain(load_config(None, arguments), world)
    return refused(world, [*runs[0], f"run.dir={load_config(None, runs[0]).run.dir.parent / 'refused'}"])


def refused(world: World, arguments: list[str]) -> list[str]:
    """What is said of a full disk, for which a limit on the size of files stands in, and of a value that is not finite
    on the last rank."""
    config, said = load_config(None, arguments), list[str]()
    made = build(config, world)
    task = Pretraining(config, world, RunPlan(5, 0, 0.05, config.optim), made, optimizer_of(config, made, world))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
    try:
        task.full_state(8)
    except OSError as error:
        said.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with torch.no_grad():
        local(made.get_parameter(WEIGHT))[-1] = torch.nan
    try:
        task.full_state(9)
    except UserError as error:
        said.append(str(error))
    return said


@pytest.fixture(scope="module")
def made(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """Runs of two processes, "shards", "file", and "continued", which a single process began, and of which the last
    checkpoint is damaged; what `refused` says."""
    root = tmp_path_factory.mktemp("sharded")
    pretrain(load_config(None, arguments_of(shards, root / "continued")), World())
    shutil.copytree(root / "continued", root / "single")
    (root / "continued" / "step-000000004.pt").unlink()
    (root / "continued" / "step-000000004.dcp" / "damaged").mkdir(parents=True)
    how = {"shards": SHARDED, "file": FSDP, "continued": SHARDED}
    return root, run_ranks(trained, 2, [arguments_of(shards, root / name, *more) for name, more in how.items()])


@pytest.fixture
def runs(made: tuple[Path, list[list[str]]]) -> Path:
    return made[0]


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Path:
    """A run to damage."""
    return Path(shutil.copytree(runs / "shards", tmp_path / "run"))


def test_the_state_is_that_of_a_file(runs: Path) -> None:
    pairs = list(zip(checkpoints(runs / "shards"), checkpoints(runs / "file"), strict=True))
    assert [path.name for path, _ in pairs] == [f"step-00000000{step}.dcp" for step in (2, 4)]
    for sharded, whole in pairs:
        found, expected = load(sharded), load(whole)
        assert found.keys() == expected.keys() >= {"method", "optimizer", "scaler", "online", "step"}
        assert all(same(found[part], expected[part]) for part in found.keys() - {"config"})
    assert not list((runs / "shards").glob("*.tmp"))


def test_each_process_has_written_its_share_and_torch_reads_it(runs: Path) -> None:
    path = checkpoints(runs / "shards")[-1]
    assert sorted(file.name for file in path.iterdir()) == FILES
    first, second = ((path / name).stat().st_size for name in FILES[1:3])
    assert 0.8 < first / second < 1.25
    weights = load(path)["method"]
    assert len(weights[TOKEN]) == 1, "of which the second process has nothing"
    read = {f"method.{name}": torch.zeros_like(weights[name]) for name in (WEIGHT, TOKEN)}
    with pytest.warns(UserWarning, match="in a single process"):
        dcp.state_dict_loader.load(read, checkpoint_id=path, no_dist=True)
    assert all(torch.equal(read[f"method.{name}"], weights[name]) for name in (WEIGHT, TOKEN))


def test_one_process_without_shards_continues_it_as_it_does_a_file(runs: Path, shards: Path, tmp_path: Path) -> None:
    found = list[Any]()
    for name in ("shards", "file"):
        shutil.copytree(runs / name, run := tmp_path / name)
        checkpoints(run)[-1].rename(tmp_path / f"last of {name}")
        pretrain(load_config(None, arguments_of(shards, run)), World())
        assert checkpoints(run)[-1].name == "step-000000004.pt"
        found.append(load(checkpoints(run)[-1]))
    assert all(same(found[0][part], found[1][part]) for part in ("method", "optimizer", "online"))


def test_two_processes_continue_what_one_has_begun(runs: Path) -> None:
    expected, found = load(checkpoints(runs / "single")[-1]), load(checkpoints(runs / "continued")[-1])
    assert [path.suffix for path in checkpoints(runs / "continued")] == [".pt", ".dcp"]
    torch.testing.assert_close(found["method"], expected["method"], rtol=1e-9, atol=1e-7)  # Adam divides by gradients


def test_what_takes_a_checkpoint_takes_it(runs: Path) -> None:
    expected = load_pretrained(runs / "file")
    for path in (runs / "shards", checkpoints(runs / "shards")[-1]):
        found = load_pretrained(path)
        assert (found.step, found.directory) == (4, runs / "shards")
        assert same(dict(found.encoder.state_dict()), dict(expected.encoder.state_dict()))
        checkpoint.initialize(found.encoder, path)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_or_a_missing_file_is_noticed_and_the_checkpoint_before_used(
    copied: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = checkpoints(copied)[-1]
    content = (path / name).read_bytes()
    for place in (0, len(content) // 2, -1):
        damaged = bytearray(content)
        damaged[place] ^= 1
        (path / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"step-000000004\.dcp.*{name}.*damaged|{name}: not a readable"):
            load(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=rf"step-000000004\.dcp: not a readable.*{name}"):
        load(path)
    assert load_latest(copied)["step"] == 2  # type: ignore[index]
    assert "falling back" in caplog.text


def killed(world: World, arguments: list[str]) -> None:
    """A run whose processes are killed in the middle of their files of the second checkpoint."""
    original, calls = dcp.filesystem._write_item, itertools.count()

    def deadly(transforms: Any, stream: Any, *more: Any) -> Any:
        if "step-000000002" in str(stream.name) and next(calls) == 3:
            stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(transforms, stream, *more)

    setattr(dcp.filesystem, "_write_item", deadly)  # noqa: B010  # of another signature
    pretrain(load_config(None, arguments), world)


def test_kill_9_in_the_middle_of_a_write_loses_nothing(shards: Path, tmp_path: Path) -> None:
    arguments = arguments_of(shards, tmp_path / "run")
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_ranks(killed, 2, [*arguments, *SHARDED])
    assert any(file.stat().st_size for file in (tmp_path / "run" / "step-000000002.tmp").iterdir())
    assert load_latest(tmp_path / "run")["step"] == 1  # type: ignore[index]
    pretrain(load_config(None, arguments), World())
    assert step_of(checkpoints(tmp_path / "run")[-1]) == 4
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_full_disk_and_values_that_are_not_finite_are_told_by_name(made: tuple[Path, list[list[str]]]) -> None:
    for rank in made[1]:
        full, broken = rank
        assert "step-000000008.tmp: rank 0 could not write its shards" in full
        assert f"step-000000009.tmp: not saved: method.{WEIGHT} has values" in broken


def test_without_shards_there_are_none_to_write() -> None:
    with pytest.raises(ConfigError, match="sharded_checkpoints: expected parallel=fsdp, found ddp"):
        load_config(None, ["run.sharded_checkpoints=true"])
