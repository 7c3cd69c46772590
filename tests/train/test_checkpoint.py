import logging
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from train.checkpoint import CheckpointError, Identity, check_identity, checkpoints, load, load_latest, save

IDENTITY = Identity("fp", 0, 64, None, [{"size": 32}], {"name": "resnet18"}, {"name": "simclr"})


def state(step: int) -> dict[str, Any]:
    weights = torch.arange(1000.0) + step
    return {"step": step, "method": {"w": weights}, "identity": IDENTITY.__dict__ | {"views": [{"size": 32}]}}


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def test_round_trip_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, state(step), keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000000002.pt", "step-000000003.pt"]
    latest = load_latest(tmp_path)
    assert latest is not None
    assert latest["step"] == 3
    assert torch.equal(latest["method"]["w"], state(3)["method"]["w"])
    assert list(tmp_path.glob("*.tmp")) == []


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_damaged_file_is_found_and_the_one_before_it_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1, state(1), keep=5)
    path = save(tmp_path, 2, state(2), keep=5)
    if damage == "flip":
        position = path.read_bytes().index(state(2)["method"]["w"].numpy().tobytes()) + 2000
        flip_byte(path, position)
    else:
        path.write_bytes(path.read_bytes()[: 3000 if damage == "truncate" else 0])
    with pytest.raises(CheckpointError, match=path.name):
        load(path)
    with caplog.at_level(logging.WARNING):
        found = load_latest(tmp_path)
    assert found is not None
    assert found["step"] == 1
    assert path.name in caplog.text


def test_only_damaged_files_are_an_error(tmp_path: Path) -> None:
    path = save(tmp_path, 1, state(1), keep=5)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 1"):
        load_latest(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("data", "other", "fingerprint"),
        ("seed", 1, "run.seed"),
        ("global_batch_size", 128, "run.global_batch_size"),
        ("window", 4, "data.window"),
        ("views", [{"size": 64}], "views"),
        ("encoder", {"name": "resnet50"}, "encoder"),
    ],
)
def test_another_identity_is_refused_by_field(field: str, value: Any, named: str) -> None:
    check_identity(state(1), IDENTITY, Path("run"))
    with pytest.raises(CheckpointError, match=named):
        check_identity(state(1), replace(IDENTITY, **{field: value}), Path("run"))


def test_a_write_that_fails_leaves_earlier_checkpoints(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: writing stops in the middle of the tensors."""
    save(tmp_path, 1, state(1), keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"step-000000002.*could not be written"):
            save(tmp_path, 2, state(2), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000000001.pt"]
    assert load(tmp_path / "step-000000001.pt")["step"] == 1
