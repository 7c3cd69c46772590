import struct
import sys
from pathlib import Path

import mlflow
import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from sharding.command import UserError
from train.engine.loggers import open_loggers

CONFIG = "run: {seed: 7, loggers: [mlflow]}\nviews: [{size: 96}]\n"


def log(name: str, directory: Path, start: int, stop: int) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "config.yaml").write_text(CONFIG)
    (logger,) = open_loggers([name], directory, start)
    for step in range(start + 1, stop + 1):
        logger.log(step, {"loss": 10.0 * step})
    logger.close()


def test_mlflow_has_one_run_with_settings_and_values_however_often_it_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the small package has no store but this and servers
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    for start, stop in ((0, 2), (2, 4)):
        log("mlflow", tmp_path / "run", start, stop)
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"run.seed": "7", "run.loggers": "['mlflow']", "views.0.size": "96"}
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(1, 10), (2, 20), (3, 30), (4, 40)]


def test_wandb_has_one_run_however_often_it_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for start, stop in ((0, 2), (2, 4)):
        log("wandb", tmp_path / "run", start, stop)
    wandb.teardown()  # its own process writes the files, and a run that is finished may not be written yet
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({file.name for file in files}) == 1, "one id"
    assert [step for file in files for step in steps(file)] == [1, 2, 3, 4]


def steps(file: Path) -> list[int]:
    """Of the records in a file of W&B: LevelDB's log format, in the first block, behind a header of 7 bytes."""
    data, found, start = file.read_bytes(), [], 7
    while start < len(data):
        _, size, _ = struct.unpack_from("<IHB", data, start)
        record = wandb_internal_pb2.Record.FromString(data[start + 7 : start + 7 + size])  # type: ignore[attr-defined]
        found += [int(item.value_json) for item in record.history.item if list(item.nested_key) == ["step"]]
        start += 7 + size
    return found


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"run.loggers: wandb is not installed; pip install 'parallax-ssl\[wandb\]'"):
        open_loggers(["wandb"], tmp_path, 0)
