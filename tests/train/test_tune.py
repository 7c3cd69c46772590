"""Studies: killed and continued, shared, pruned, refused."""

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.census import wait_until
from tests.train.runs import SMALL
from train.config import load_config
from train.engine.checkpoint import checkpoints
from train.engine.monitor import read_metrics
from train.pretrain import main as pretrain
from train.tune import main

optuna = pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'parallax-ssl[tune]'")
_FORKSERVER = multiprocessing.get_context("forkserver")  # has imported train.pretrain: tests.processes
SEARCH = {"optim.learning_rate": {"low": 0.01, "high": 1.0, "log": True}, "method.temperature": [0.2, 0.5]}


def write_study(folder: Path, shards: Path, section: str = "search", tried: Any = SEARCH) -> list[str]:
    """Arguments of a command for a study in ``folder``."""
    tree: dict[str, Any] = {"data": {"shards": str(shards)}, "run": {"dir": str(folder / "run")}, section: tried}
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(tree))
    few = [s for s in SMALL if not s.startswith(("optim.learning_rate", "method.temperature"))]
    return ["--config", str(folder / "study.yaml"), "--study", str(folder / "study"), *few, "run.loggers=[]"]


def as_process(arguments: list[str]) -> Any:
    tuner = _FORKSERVER.Process(target=main, args=(arguments,))
    tuner.start()
    return tuner


@pytest.fixture(scope="module")
def study(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three trials: a tuner finished one and was killed in the second, then two tuners were started at once."""
    folder = tmp_path_factory.mktemp("tune")
    arguments = [*write_study(folder, shards), "--trials", "3"]
    killed = as_process(arguments)
    second = folder / "study" / "trial-0001"
    wait_until(lambda: checkpoints(second) or not killed.is_alive())
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    (folder / "first-before").write_bytes((folder / "study" / "trial-0000" / "metrics.jsonl").read_bytes())
    other = as_process(arguments)
    assert main(arguments) == 0
    other.join()
    assert (killed.exitcode, other.exitcode) == (-signal.SIGKILL, 0)
    return folder


def found(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "study" / "study.json").read_text()))


def test_finished_trials_are_neither_lost_nor_repeated(study: Path) -> None:
    trials = found(study)["trials"]
    assert [(trial["trial"], trial["state"]) for trial in trials] == [(n, "complete") for n in range(3)]
    assert len({trial["optim.learning_rate"] for trial in trials}) == 3
    first = study / "study" / "trial-0000" / "metrics.jsonl"
    assert first.read_bytes() == (study / "first-before").read_bytes()


def test_the_best_configuration_is_one_to_run(study: Path) -> None:
    record = found(study)
    best = max(record["trials"], key=lambda trial: trial["value"])
    config = load_config(study / "study" / "best.yaml")
    assert config.optim.learning_rate == best["optim.learning_rate"]
    assert config.run.dir == study / "run", "not the directory of a trial"
    assert pretrain(["--config", str(study / "study" / "best.yaml")]) == 0
    again, trial = read_metrics(study / "run"), read_metrics(study / "study" / f"trial-{best['trial']:04d}")
    assert [record["loss"] for record in again] == [record["loss"] for record in trial]
    assert set(record["importances"]) == set(SEARCH)
