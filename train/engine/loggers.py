"""Where the records of a run go beside ``metrics.jsonl``: TensorBoard, Weights & Biases, MLflow.

The services are told where to write by their own environment variables (``WANDB_PROJECT``, ``WANDB_MODE=offline``,
``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``). A run that continues is the same one there.
"""

import importlib
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import yaml
from torch.utils.tensorboard import SummaryWriter

from sharding.command import UserError
from train.overrides import leaves


class Logger(Protocol):
    """Takes host values after ``step`` updates, until it is closed."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def open_loggers(names: Sequence[str], directory: Path, start_step: int) -> list[Logger]:
    """For the run in ``directory``, with its ``config.yaml``. Raises UserError where a package is missing."""
    made: dict[str, Callable[[Path, str], Logger]] = {
        "tensorboard": partial(_TensorBoard, start_step),
        "wandb": _Wandb,
        "mlflow": _MLflow,
    }
    config = directory / "config.yaml"
    return [made[name](directory, config.read_text() if config.exists() else "") for name in names]


class _TensorBoard:
    def __init__(self, start_step: int, directory: Path, config: str) -> None:
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start_step + 1)
        self._board.add_text("config", f"```yaml\n{config}```", start_step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


class _Wandb:
    def __init__(self, directory: Path, config: str) -> None:
        wandb, note = _package("wandb"), directory / "wandb-id"
        if not note.exists():
            note.write_text(secrets.token_hex(4))
        settings = {"id": note.read_text(), "resume": "allow", "name": directory.name, "dir": str(directory)}
        self._run = wandb.init(config=yaml.safe_load(config), **settings)
        self._run.define_metric("*", step_metric="step")  # its own count must not go back, as after a kill ours does

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, directory: Path, config: str) -> None:
        self._mlflow, note = _package("mlflow"), directory / "mlflow-id"
        if note.exists():
            self._mlflow.start_run(run_id=note.read_text())
        else:
            note.write_text(self._mlflow.start_run(run_name=directory.name).info.run_id)
            self._mlflow.log_params(dict(leaves(yaml.safe_load(config) or {})))

    def log(self, step: int, values: dict[str, float]) -> None:
        self._mlflow.log_metrics(values, step=step, synchronous=False)

    def close(self) -> None:
        self._mlflow.flush_async_logging()
        self._mlflow.end_run()


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"run.loggers: {name} is not installed; pip install 'parallax-ssl[{name}]'") from None
