"""Studies: killed and continued, shared, pruned, refused."""

import argparse
import json
import multiprocessing
import os
import re
import signal
import sys
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
from train.tune import distribution, main, read_study

optuna = pytest.importorskip("optuna", reason="Optuna is not installed: pip install 'parallax-ssl[tune]'")
pytestmark = pytest.mark.filterwarnings("ignore:.*importances will be equal")  # as they are of so few trials
_FORKSERVER = multiprocessing.get_context("forkserver")  # has imported train.pretrain: tests.processes
SEARCH = {"optim.learning_rate": {"low": 0.01, "high": 1.0, "log": True}, "method.temperature": [0.2, 0.5]}
SMALL_OF_STUDY = [s for s in SMALL if s.partition("=")[0] not in SEARCH] + ["run.loggers=[]"]


def write_study(folder: Path, shards: Path, section: str = "search", tried: Any = SEARCH) -> list[str]:
    """Arguments of a command for a study in ``folder``."""
    tree: dict[str, Any] = {"data": {"shards": str(shards)}, "run": {"dir": str(folder / "run")}, section: tried}
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(tree))
    return ["--config", str(folder / "study.yaml"), "--study", str(folder / "study"), *SMALL_OF_STUDY]


def run(arguments: list[str], python: str) -> None:
    sys.executable = python
    sys.exit(main(arguments))


def as_process(arguments: list[str], python: str = sys.executable) -> Any:
    tuner = _FORKSERVER.Process(target=run, args=(arguments, python))
    tuner.start()
    return tuner


@pytest.fixture(scope="module")
def study(shards: Path, program: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three trials: a tuner finished one and was killed in the second, then two tuners were started at once."""
    folder = tmp_path_factory.mktemp("tune")
    arguments = [*write_study(folder, shards), "optim.steps=40", "run.checkpoint_every=40", "--trials", "3"]
    killed = as_process(arguments, program)
    second = folder / "study" / "trial-0001"
    wait_until(lambda: (second / "metrics.jsonl").exists() or not killed.is_alive())
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    (folder / "first-before").write_bytes((folder / "study" / "trial-0000" / "metrics.jsonl").read_bytes())
    other = as_process(arguments, program)
    with pytest.MonkeyPatch.context() as started:
        started.setattr(sys, "executable", program)
        assert main(arguments) == 0
    other.join()
    assert (killed.exitcode, other.exitcode) == (-signal.SIGKILL, 0)
    return folder


def found(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "study" / "study.json").read_text()))


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run)]


def test_finished_trials_are_neither_lost_nor_repeated(study: Path) -> None:
    trials = found(study)["trials"]
    assert [(trial["trial"], trial["state"]) for trial in trials] == [(n, "complete") for n in range(3)]
    assert len({trial["optim.learning_rate"] for trial in trials}) == 3
    first = study / "study" / "trial-0000" / "metrics.jsonl"
    assert first.read_bytes() == (study / "first-before").read_bytes()


def test_a_half_done_trial_continues_its_run_exactly(study: Path, tmp_path: Path) -> None:
    run = study / "study" / "trial-0001"
    starts = [json.loads(line)["start_step"] for line in (run / "provenance.jsonl").read_text().splitlines()]
    assert starts[0] == 0
    assert all(step > 0 for step in starts[1:]), "none: it was done before this process had its turn"
    assert pretrain(["--config", str(run / "config.yaml"), f"run.dir={tmp_path}"]) == 0
    assert losses(run) == losses(tmp_path)


def test_the_best_configuration_is_one_to_run(study: Path) -> None:
    record = found(study)
    best = max(record["trials"], key=lambda trial: trial["value"])
    assert pretrain(["--config", str(study / "study" / "best.yaml")]) == 0
    assert losses(study / "run") == losses(study / "study" / f"trial-{best['trial']:04d}")
    assert set(record["importances"]) == set(SEARCH)


def test_a_study_of_different_settings_is_not_mixed_with_it(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(study / "study.yaml"), "--study", str(study / "study")]
    assert main([*arguments, *SMALL_OF_STUDY, "optim.steps=41", "run.checkpoint_every=40"]) == 2
    assert "begun with optim.steps 40, now 41; choose a different --study" in capsys.readouterr().err


@pytest.mark.usefixtures("at_once")
def test_a_trial_worse_than_the_median_is_pruned(shards: Path, tmp_path: Path) -> None:
    arguments = write_study(tmp_path, shards)
    arguments += ["optim.steps=1000", "run.checkpoint_every=10000", "--prune-after", "0", "--trials"]
    assert main([*arguments, "0"]) == 0, "the study is made, and has no trials yet"
    storage = f"sqlite:///{tmp_path}/study/study.db"
    begun = optuna.load_study(study_name="study", storage=storage)
    better = dict.fromkeys(range(1, 21), 101.0)
    for _ in range(5):
        begun.add_trial(optuna.trial.create_trial(value=101.0, intermediate_values=better))
    assert main([*arguments, "6"]) == 0
    assert found(tmp_path)["trials"][-1]["state"] == "pruned"
    (path,) = checkpoints(tmp_path / "study" / "trial-0005")
    assert int(path.stem.removeprefix("step-")) < 1000, "it was stopped and saved"


def test_ray_places_tuners_which_stop_and_go_on(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'parallax-ssl[ray]'")
    arguments = [*write_study(tmp_path, shards), "optim.steps=400", "--trials", "2", "--engine", "ray"]
    stopped = as_process(arguments)
    wait_until(lambda: any(tmp_path.glob("study/*/metrics.jsonl")) or not stopped.is_alive())
    children = Path(f"/proc/{stopped.pid}/task/{stopped.pid}/children").read_text().split()
    assert any("raylet" in Path(f"/proc/{child}/cmdline").read_text() for child in children)
    os.kill(stopped.pid, signal.SIGTERM)
    stopped.join()
    assert stopped.exitcode == 3
    assert any(checkpoints(run) for run in tmp_path.glob("study/trial-*")), "by the signal"
    assert "running" in {trial["state"] for trial in found(tmp_path)["trials"]}
    finishing = as_process(arguments)
    finishing.join()
    assert finishing.exitcode == 0
    assert [trial["state"] for trial in found(tmp_path)["trials"]] == ["complete"] * 2


@pytest.mark.parametrize(
    ("tried", "message"),
    [
        ({}, "expected a section 'search' that says what to try, found {}"),
        ({"optim.learning_rte": [1, 2]}, "search: optim.learning_rte: .*did you mean 'learning_rate'"),
        ({"optim.momentum": {"low": 0.5, "high": 2}}, "search: optim.momentum: override 'optim.momentum=2.0'"),
        ({"optim.momentum": {"low": 0.9, "high": 0.5}}, "search: optim.momentum: .*low <= high"),
        ({"optim.momentum": {"low": 0, "high": 0.5, "log": True}}, "search: optim.momentum: .*low > 0"),
        ({"optim.momentum": {"low": 0, "hihg": 1}}, "search: optim.momentum: expected a list of choices, or low and"),
        ({"optim.momentum": []}, "search: optim.momentum: .*one or more"),
        ({"encoder.width": [8]}, "search: encoder.width is an override as well"),
    ],
)
def test_a_wrong_search_is_told_by_its_key(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tried: Any, message: str
) -> None:
    assert main(write_study(tmp_path, shards, tried=tried)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "study").exists()


def test_a_range_is_of_whole_numbers_where_its_ends_are() -> None:
    assert distribution({"low": 8, "high": 32, "step": 8}) == optuna.distributions.IntDistribution(8, 32, step=8)
    assert distribution({"low": "1e-4", "high": 1, "log": True}) == optuna.distributions.FloatDistribution(
        1e-4, 1, True
    )
    assert distribution([[0.2, 1.0], None]).choices == ("[0.2, 1.0]", None)


def test_an_override_replaces_the_length_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"optim": {"epochs": 3, "momentum": 0.5}, "method": "byol", "search": {"a": [1]}}))
    options = argparse.Namespace(config=path, overrides=["optim.steps=5"])
    config = load_config(None, read_study(options, "search")[1])
    assert (config.method.name, config.optim.steps, config.optim.momentum) == ("byol", 5, 0.5)


def test_a_database_that_is_none_is_refused(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*write_study(tmp_path, shards), "--storage", "nonsense"]) == 2
    assert "--storage: Could not parse" in capsys.readouterr().err


def test_optuna_is_asked_for_by_the_name_of_its_extra(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.tune.optuna", None)
    assert main(write_study(tmp_path, shards)) == 2
    assert "pip install 'parallax-ssl[tune]'" in capsys.readouterr().err


def test_ray_is_asked_for_by_the_name_of_its_extra(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*write_study(tmp_path, shards), "--engine", "ray"]) == 2
    assert "pip install 'parallax-ssl[ray]'" in capsys.readouterr().err
