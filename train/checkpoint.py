"""Checkpoints: tensors and plain Python in one file, written beside and renamed, verified before use.

What the stream of batches depends on (`Identity`) is stored and must agree on resume; what it does not depend on
(world size, backend, threads) may change.
"""

import logging
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sharding.command import UserError
from sharding.manifest import Manifest
from sharding.storage import rename_durably
from train.config import Config

log = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file or the field that differs."""


@dataclass(frozen=True)
class Identity:
    """All that decides the batches and the meaning of the weights. Two runs of equal identity are one run."""

    data: str
    seed: int
    global_batch_size: int
    window: int | None
    views: list[dict[str, Any]]
    encoder: dict[str, Any]
    method: dict[str, Any]

    @classmethod
    def of(cls, config: Config, manifest: Manifest) -> "Identity":
        plain = config.model_dump(mode="json")
        return cls(
            manifest.fingerprint,
            config.run.seed,
            config.run.global_batch_size,
            config.data.window,
            plain["views"],
            plain["encoder"],
            plain["method"],
        )


def save(directory: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write ``step-<step>.pt``, durably and all or nothing, then drop all but the newest ``keep``.

    Raises OSError when the file cannot be written; the earlier checkpoints are then untouched.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"step-{step:09d}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
        rename_durably(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch's zip writer
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: the checkpoint could not be written ({error}); free space or change run.dir") from error
    for old in checkpoints(directory)[:-keep]:
        old.unlink()
    return path


def checkpoints(directory: Path) -> list[Path]:
    """All complete checkpoints, oldest first."""
    return sorted(directory.glob("step-*.pt"))


def load(path: Path) -> dict[str, Any]:
    """The state in a file, on the CPU. Raises `CheckpointError` when the file is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"{path}: damaged (checksum of {damaged} differs); use an earlier checkpoint")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, zipfile.BadZipFile, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint ({error})") from error
    return state


def load_latest(directory: Path) -> dict[str, Any] | None:
    """The newest readable state, or None without checkpoints. Unreadable newer ones are reported and passed over."""
    found = checkpoints(directory)
    for path in reversed(found):
        try:
            return load(path)
        except CheckpointError as error:
            log.warning("%s; falling back to the checkpoint before it", error)
    if found:
        raise CheckpointError(
            f"{directory}: none of the {len(found)} checkpoints is readable; move them away to restart"
        )
    return None


def check_identity(state: dict[str, Any], expected: Identity, where: Path) -> None:
    """Raises `CheckpointError`, naming the field, unless the checkpoint belongs to a run of this identity."""
    found = state["identity"]
    for field, value in asdict(expected).items():
        if found[field] != value:
            raise CheckpointError(
                f"{where}: the checkpoint was made with another {_FIELD_NAMES.get(field, field)}: expected "
                f"{value}, found {found[field]}; restore it, or start a new run with another run.dir"
            )


_FIELD_NAMES = {
    "data": "data set (fingerprint of data.shards)",
    "seed": "run.seed",
    "global_batch_size": "run.global_batch_size",
    "window": "data.window",
}
