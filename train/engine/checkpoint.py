"""Checkpoints: tensors and plain Python in one file, written beside and renamed, verified before use.

A file is a zip archive as torch writes it, with the xxh3_128 of everything before it as the archive's comment. So any
damage is noticed, and ``torch.load(path, weights_only=True)`` still reads it. Where processes have written their shards
themselves (`train.processes.fsdp.write`) it lies in one directory with those, and has their checksums.

What the stream of batches depends on (`identity_of`) is stored and must agree on resume; what it does not depend on
(world size, backend, threads) may change.
"""

import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import xxhash
from safetensors.torch import load_file

from sharding.command import UserError
from sharding.storage import checksum, rename_durably
from train.config import Config, load_config, validate
from train.engine.foreign import HARMLESS, encoder_weights
from train.methods import build_method
from train.model.encoder import Encoder
from train.overrides import apply, leaves
from train.processes import fsdp
from train.processes.distributed import World

log = logging.getLogger(__name__)

State = dict[str, Any]  # "method", "optimizer": state dicts; "step"; "identity"; "config"

_MARK = b"xxh3_128="
_SEAL_BYTES = len(_MARK) + 32  # in hexadecimal digits
_CHUNK_BYTES = 1 << 24
_SHARDED = ".dcp"  # a directory
_STATE = "state.pt"  # the file in it that is like the others


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file or the field that differs."""


def identity_of(config: Config, fingerprint: str) -> dict[str, Any]:
    """All that decides the batches and the meaning of the weights. Two runs of equal identity are one run."""
    plain = config.model_dump(mode="json")
    return {
        "data": fingerprint,
        **{name: plain["run"][name] for name in ("seed", "global_batch_size")},
        "window": config.data.window,
        **{name: plain[name] for name in ("views", "encoder", "method")},
        "optimizer": config.optim.name,
    }


class Writer:
    """Writes checkpoints in the background, one at a time, and keeps the newest ``keep`` and every ``keep_every``-th
    step for ever. Use as a context: at its end everything is written, or the error is raised."""

    def __init__(self, directory: Path, keep: int, keep_every: int | None = None) -> None:
        self._directory, self._keep, self._keep_every = directory, keep, keep_every
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        for left in directory.glob("step-*.tmp"):  # by a run that was killed
            _remove(left)

    def save(self, step: int, state: State) -> None:
        """Start writing ``state``, of which a copy is made here. Raises the error of the write before, if it failed."""
        self.wait()
        self._writing = self._executor.submit(self._write, step, _copy(state))

    def wait(self) -> None:
        """Until nothing is being written. Raises what prevented it: OSError, or UserError for values that are not
        finite; the earlier checkpoints are then untouched."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._executor.shutdown()
        if error is None:
            self.wait()

    def _write(self, step: int, state: State) -> None:
        save(self._directory, step, state)
        for path in checkpoints(self._directory)[: -self._keep]:
            if not self._keep_every or step_of(path) % self._keep_every:
                _remove(path)


def save(directory: Path, step: int, state: State) -> Path:
    """Write ``step-<step>.pt``, durably and all or nothing; where the state has the places of shards (`fsdp.write`) a
    directory of that name in ``.dcp``, from the `unfinished` one that they are in.

    Raises OSError when the file cannot be written, and UserError, naming the tensor, for values that are not finite.
    """
    for name, tensor in _tensors(state):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"{directory}: the state after step {step} is not saved: {name} has values that are not finite; "
                "continue from an earlier checkpoint with a lower learning rate"
            )
    directory.mkdir(parents=True, exist_ok=True)
    temporary, sharded = unfinished(directory, step), "files" in state
    path, file = temporary.with_suffix(_SHARDED if sharded else ".pt"), temporary / _STATE if sharded else temporary
    try:
        if sharded:
            state = state | {"files": {name: _hash(temporary / name) for name in state["files"]}}
            shutil.rmtree(path, ignore_errors=True)  # one that could not be read
        with file.open("wb") as opened:
            torch.save(state, opened)
        _seal(file)
        rename_durably(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch's zip writer
        _remove(temporary)
        reason = error if isinstance(error, OSError) else "is the disk full?"
        raise OSError(
            f"{path}: the checkpoint could not be written ({reason}); free space or change run.dir"
        ) from error
    return path


def unfinished(directory: Path, step: int) -> Path:
    """Where the checkpoint after a step is until it is complete."""
    return directory / f"step-{step:09d}.tmp"


def checkpoints(directory: Path) -> list[Path]:
    """All complete checkpoints, oldest first."""
    return sorted(path for path in directory.glob("step-*") if path.suffix in (".pt", _SHARDED))


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def load(path: Path) -> State:
    """The state in a file or in a directory with shards, on the CPU. Raises `CheckpointError` where any of it is
    missing, damaged or something else."""
    sharded = path.is_dir()
    try:
        _check(file := path / _STATE if sharded else path)
        state: State = torch.load(file, map_location="cpu", weights_only=True)
        for name, expected in state.pop("files").items() if sharded else ():
            if _hash(path / name) != expected:
                raise CheckpointError(f"{path / name}: damaged (its checksum differs); use an earlier checkpoint")
        state = fsdp.read(state, path) if sharded else state
    except CheckpointError:
        raise
    except Exception as error:  # damage has as many of them as torch's reader has lines
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason})") from None
    if not isinstance(state, dict) or not state.keys() >= {"method", "optimizer", "step", "identity", "config"}:
        raise CheckpointError(f"{path}: not a checkpoint of train.pretrain")
    return state


def load_latest(directory: Path) -> State | None:
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


def check_identity(state: State, expected: dict[str, Any], where: Path) -> None:
    """Raises `CheckpointError`, naming the field, unless the checkpoint belongs to a run of this identity.

    The stored configuration is read by today's models, so that a field that is new and has a default is equal.
    """
    fingerprint = state["identity"]["data"]
    found = identity_of(validate(state["config"], f"{where}: its configuration"), fingerprint)
    for field, value in expected.items():
        if found[field] != value:
            raise CheckpointError(
                f"{where}: the checkpoint was made with a different {_FIELD_NAMES.get(field, field)}: expected "
                f"{value}, found {found[field]}; set it back, or choose a new run.dir"
            )


_FIELD_NAMES = {
    "data": "data set (fingerprint of data.shards)",
    "seed": "run.seed",
    "global_batch_size": "run.global_batch_size",
    "window": "data.window",
    "optimizer": "optim.name",
}


def changed_settings(state: State, config: Config) -> list[str]:
    """What the configuration says that the checkpoint's did not, each as "optim.x: old -> new"."""
    configs = validate(state["config"], "checkpoint"), config
    before, after = (dict(leaves(each.model_dump(mode="json"))) for each in configs)
    return [f"{name}: {before.get(name)} -> {value}" for name, value in after.items() if before.get(name) != value]


class Pretrained(NamedTuple):
    """An encoder to evaluate or to export; ``config`` is that of its run, or of a file of other people what the user
    said of it; ``step`` counts the updates that it was trained for, on ``data`` of that fingerprint, None where that is
    unknown; it was read from ``path``, and results about it go to ``directory``."""

    encoder: Encoder
    config: Config
    step: int | None
    data: str | None
    directory: Path
    path: Path


def load_pretrained(path: Path, overrides: Sequence[str] = ()) -> Pretrained:
    """The encoder of a run's directory (its newest readable checkpoint), of one of its checkpoints, or of a file of
    other people (see `initialize`), in evaluation mode, on the CPU.

    ``overrides`` are settings: ``data.cache_dir=...`` or ``views.size=...``, and for a file of other people also what
    its encoder is, such as ``encoder.name=timm:vit_base_patch16_224``. Raises `CheckpointError` and `ConfigError`.
    """
    single = path.is_file() or path.suffix == _SHARDED
    directory = path.parent if single else path
    if path.is_file() and not path.match("step-*.pt") and "identity" not in _content(path, "--checkpoint"):
        config = load_config(None, overrides)
        encoder = Encoder(config.encoder)
        initialize(encoder, path, "--checkpoint")
        return Pretrained(encoder.eval(), config, None, None, directory, path)
    state = load(path) if single else load_latest(path)
    if state is None:
        raise CheckpointError(f"{path}: expected a checkpoint or a run directory with checkpoints")
    for override in overrides:
        if not override.startswith(("data.", "views.")):
            raise CheckpointError(f"{override}: expected settings of data, views or protocols; the run has the others")
        apply(state["config"], override)
    config = validate(state["config"], str(path), overrides)
    method = build_method(config.method, config.encoder, World())
    method.load_state_dict(state["method"])
    encoder, data = method.exported().float().eval(), state["identity"].get("data")
    return Pretrained(encoder, config, state["step"], data, directory, path)


def load_encoder(path: str | Path) -> Encoder:
    """The encoder that a run exports, or that of a file: see `load_pretrained`."""
    return load_pretrained(Path(path)).encoder


def initialize(encoder: Encoder, path: Path, field: str = "run.init_from") -> None:
    """Give the encoder the weights of ``path``: a run, one of its checkpoints, or a torch or safetensors file of
    other people (see `train.engine.foreign`), whose heads are left out. Raises `CheckpointError`, naming the ``field``
    of the configuration and what does not fit."""
    if path.is_dir() or "identity" in (content := _content(path, field)):
        weights = load_pretrained(path).encoder.state_dict()
    else:
        weights = {f"backbone.{name}": value for name, value in encoder_weights(content).items()}
    own = encoder.state_dict()
    weights = {n: w for n, w in weights.items() if n in own or not n.startswith(_CLASSIFIERS)}
    weights |= {n: w for n, w in own.items() if n.endswith("num_batches_tracked") and n not in weights}  # old files
    for name in sorted(own.keys() | weights.keys()):
        expected, found = (tuple(d[name].shape) if name in d else "nothing" for d in (own, weights))
        if expected != found:
            own_section = "method.teacher" if field == "method.weights" else "encoder"
            raise CheckpointError(
                f"{field}: {path}: {name}: expected {expected}, found {found}; set `{own_section}` to theirs"
            )
    encoder.load_state_dict(weights)


_CLASSIFIERS = tuple(f"backbone.{name}." for name in ("fc", "head", "classifier"))


def _content(path: Path, field: str) -> dict[str, Any]:
    """Of a file. No code that it may have is run."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(HARMLESS):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        why = str(error).splitlines()[0]
        if found := re.search(r"GLOBAL (\S+) was not an allowed", str(error)):
            why = f"it holds {found[1]}, which may run code when read; save the tensors alone, as a state_dict"
        raise CheckpointError(f"{field}: {path}: cannot be read ({why})") from None


def _copy(value: Any) -> Any:
    """The state on the host, apart from what training goes on to change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list | tuple) else value


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}".lstrip("."))


def _seal(path: Path) -> None:
    """Give the archive its checksum as a comment. Its last two bytes, zeros until then, are the comment's length."""
    with path.open("r+b") as file:
        file.seek(-2, 2)
        file.write(_SEAL_BYTES.to_bytes(2, "little"))
        file.seek(0)
        file.write(_checksum(file, path.stat().st_size))
        file.flush()
        os.fsync(file)


def _check(path: Path) -> None:
    """Raises `CheckpointError` for any damage. Files of before there was a seal have checksums of their contents."""
    with path.open("rb") as file:
        expected, seal = _checksum(file, max(0, path.stat().st_size - _SEAL_BYTES)), file.read()
    if seal != expected:
        if not _is_unsealed(path, seal):
            raise CheckpointError(f"{path}: damaged (its checksum differs); use an earlier checkpoint")
        log.info("%s is of an earlier version, without a checksum of the whole file", path)


def _checksum(file: BinaryIO, size: int) -> bytes:
    """The seal of the next ``size`` bytes."""
    digest = xxhash.xxh3_128()
    while size and (chunk := file.read(min(size, _CHUNK_BYTES))):
        digest.update(chunk)
        size -= len(chunk)
    return _MARK + digest.hexdigest().encode()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return checksum(file)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_unsealed(path: Path, end: bytes) -> bool:
    """Whether it is a sound archive with the ``end`` of one that has no comment."""
    with zipfile.ZipFile(path) as archive:
        return end[-22:].startswith(b"PK\x05\x06") and end.endswith(b"\0\0") and archive.testzip() is None
