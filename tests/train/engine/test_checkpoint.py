import logging
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from sharding.manifest import open_shards
from tests.processes import start_command
from train.config import load_config
from train.engine import checkpoint
from train.engine.checkpoint import (
    CheckpointError,
    Writer,
    check_identity,
    checkpoints,
    identity_of,
    load,
    load_latest,
    save,
)
from train.pretrain import main

# Made at commits f50895e, without a seal, and e85dde5
KEPT = [Path(__file__).parent / "data" / f"checkpoint-of-version-{number}.pt" for number in (0, 1)]
CONFIG = load_config(None, ["encoder.name=resnet18", "run.global_batch_size=64"])
IDENTITY = identity_of(CONFIG, "fp")


def state(step: int) -> dict[str, Any]:
    weights = torch.arange(1000.0) + step
    config = CONFIG.model_dump(mode="json")
    return {"step": step, "method": {"w": weights}, "optimizer": {}, "identity": {"data": "fp"}, "config": config}


def test_round_trip(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, state(step))
    latest = load_latest(tmp_path)
    assert latest is not None
    assert latest["step"] == 3
    assert torch.equal(latest["method"]["w"], state(3)["method"]["w"])
    assert list(tmp_path.glob("*.tmp")) == []
    assert torch.load(checkpoints(tmp_path)[0], weights_only=True)["step"] == 1, "torch reads it as it is"


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") is None


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, 1, state(1) | {"method": {"w": torch.arange(10.0)}})
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"step-000000001\.pt"):
            load(path)


@pytest.mark.parametrize("length", [0, 1, 100, 3000, -41, -1])
def test_a_truncated_file_is_noticed_and_the_one_before_it_used(
    tmp_path: Path, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1, state(1))
    path = save(tmp_path, 2, state(2))
    path.write_bytes(path.read_bytes()[:length])
    with caplog.at_level(logging.WARNING):
        found = load_latest(tmp_path)
    assert found is not None
    assert found["step"] == 1
    assert path.name in caplog.text


@pytest.mark.parametrize("content", [{"a": torch.zeros(2)}, [1, 2], "text"])
def test_a_file_of_something_else_is_no_checkpoint(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "step-000000001.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load(tmp_path / "step-000000001.pt")


def test_only_damaged_files_are_an_error(tmp_path: Path) -> None:
    path = save(tmp_path, 1, state(1))
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 1"):
        load_latest(tmp_path)


def first_settings(run: Path) -> list[str]:
    """Of the run that the kept files are of."""
    return [
        *("views.size=32", "views.kernel=5", "encoder.name=resnet18", "encoder.width=1", "method.hidden=4"),
        *("method.out=4", "method.layers=2", "optim.name=sgd", "method.temperature=0.5"),
        *("run.global_batch_size=24", f"run.dir={run}", "data.num_threads=1"),
    ]


def test_a_checkpoint_of_the_first_version_is_read() -> None:
    assert checkpoint.load_encoder(KEPT[0])(torch.zeros(1, 3, 32, 32)).shape == (1, 8)


@pytest.mark.parametrize("kept", KEPT)
def test_checkpoints_of_all_versions_continue(kept: Path, shards: Path, tmp_path: Path) -> None:
    """By a step without gradient or rate, so that weights stay and momenta shrink by their factor."""
    before = load(kept)
    assert before["step"] == 2
    before["identity"]["data"] = open_shards(shards).manifest.fingerprint
    save(tmp_path, 2, before)
    still = ["optim.steps=3", "optim.learning_rate=1e-30", "optim.clip_norm=1e-30"]
    assert main([*first_settings(tmp_path), *still, f"data.shards={shards}"]) == 0
    after = load(checkpoints(tmp_path)[-1])
    assert after["step"] == 3
    for name, value in before["method"].items():
        assert torch.equal(after["method"][name], value) or "running" in name or "num_batches" in name
    for number, values in before["optimizer"]["state"].items():
        found = after["optimizer"]["state"][number]["momentum_buffer"]
        torch.testing.assert_close(found, 0.9 * values["momentum_buffer"])


def test_values_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    save(tmp_path, 1, state(1))
    broken = state(2)
    broken["method"]["w"][3] = float("inf")
    with pytest.raises(ValueError, match=r"step 2 is not saved: method\.w has values that are not finite"):
        save(tmp_path, 2, broken)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001.pt"]


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("data", "other", "fingerprint"),
        ("seed", 1, "run.seed"),
        ("global_batch_size", 128, "run.global_batch_size"),
        ("window", 4, "data.window"),
        ("views", [{"size": 64}], "views"),
        ("encoder", {"name": "resnet50"}, "encoder"),
        ("optimizer", "adamw", "optim.name"),
    ],
)
def test_a_different_identity_is_refused_by_field(field: str, value: Any, named: str) -> None:
    check_identity(state(1), IDENTITY, Path("run"))
    with pytest.raises(CheckpointError, match=named):
        check_identity(state(1), IDENTITY | {field: value}, Path("run"))


def test_a_field_that_the_checkpoint_does_not_know_has_its_default() -> None:
    old = state(1)
    for section, field in (("method", "layers"), ("encoder", "stem"), ("run", "keep_every")):
        del old["config"][section][field]
    check_identity(old, IDENTITY, Path("run"))


def test_changed_settings_are_named() -> None:
    given = ["encoder.name=resnet18", "run.global_batch_size=64", "optim.weight_decay=0.5", "run.batchnorm=local"]
    changed = load_config(None, [*given, "run.micro_batch_size=8"])
    assert checkpoint.changed_settings(state(1), changed) == [
        "optim.weight_decay: 1e-06 -> 0.5",
        "run.micro_batch_size: None -> 8",
        "run.batchnorm: global -> local",
    ]


def test_a_write_that_fails_leaves_earlier_checkpoints(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: writing stops in the middle of the tensors."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Writer(tmp_path, keep=1) as writer:
        writer.save(1, state(1))
        writer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            writer.save(2, state(2))
            with pytest.raises(OSError, match=r"step-000000002.*could not be written.*free space"):
                writer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000000001.pt"]
    assert load(tmp_path / "step-000000001.pt")["step"] == 1


def test_the_newest_are_kept_and_every_nth_for_ever(tmp_path: Path) -> None:
    with Writer(tmp_path, keep=2, keep_every=4) as writer:
        for step in range(1, 11):
            writer.save(step, state(step))
    assert [checkpoint.step_of(path) for path in checkpoints(tmp_path)] == [4, 8, 9, 10]


def test_what_is_written_is_the_state_at_the_call(tmp_path: Path) -> None:
    changing = state(1)
    with Writer(tmp_path, keep=1) as writer:
        writer.save(1, changing)
        changing["method"]["w"].fill_(-1)
    assert torch.equal(load(checkpoints(tmp_path)[0])["method"]["w"], state(1)["method"]["w"])


def killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save_twice(folder: Path, moment: str) -> int:
    """Killed at a moment of the second time."""
    save(folder, 1, state(1))
    setattr(checkpoint, moment, killed)
    save(folder, 2, state(2))
    return 0


@pytest.mark.parametrize("moment", ["_seal", "rename_durably"])
def test_kill_9_in_the_middle_of_a_write_loses_nothing(tmp_path: Path, moment: str) -> None:
    saving = start_command(save_twice, tmp_path / "said.txt", tmp_path, moment)
    saving.join()
    assert saving.exitcode == -signal.SIGKILL
    assert (tmp_path / "step-000000002.tmp").exists()
    latest = load_latest(tmp_path)
    assert latest is not None
    assert latest["step"] == 1


def test_weights_of_a_run_a_file_and_torchvision_to_begin_with(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    from train.model.encoder import Encoder, EncoderConfig

    encoder = Encoder(EncoderConfig(name="resnet18"))
    theirs = resnet18()
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    checkpoint.initialize(encoder, tmp_path / "resnet18.pth")
    assert torch.equal(encoder.backbone.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)
    checkpoint.initialize(small := Encoder(EncoderConfig(name="resnet18", width=1)), KEPT[0])
    expected = load(KEPT[0])["method"]["encoder.backbone.conv1.weight"]
    assert torch.equal(small.state_dict()["backbone.conv1.weight"], expected)
    with pytest.raises(CheckpointError, match=r"init_from: .*resnet18\.pth: backbone\.bn1\.bias: expected \(1,\)"):
        checkpoint.initialize(small, tmp_path / "resnet18.pth")
