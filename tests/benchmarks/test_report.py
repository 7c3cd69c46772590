import json
import os
from pathlib import Path

import pytest

from benchmarks.measure import Rate
from benchmarks.report import environment, save, show


def test_the_environment_says_what_is_needed_to_judge_a_result() -> None:
    found = environment()
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert {"torch", "torchvision", "numba", "simplejpeg", "webdataset"} <= found["libraries"].keys()
    assert found["cpu"]
    json.dumps(found)


def test_results_are_saved_with_it(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.json"
    save(path, "python -m benchmarks.x", {"loader": {"cpu": (1.0, 2.0)}})
    record = json.loads(path.read_text())
    assert record["command"] == "python -m benchmarks.x"
    assert record["results"] == {"loader": {"cpu": [1.0, 2.0]}}
    assert record["environment"]["python"].startswith("3.")


def test_the_table_shows_rates_and_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    show("title", "images/s", {"slow": Rate((10.0, 20.0)), "fast": Rate((40.0, 60.0))}, "slow")
    printed = capsys.readouterr().out
    assert "title" in printed
    assert "50 (40 to 60)" in printed
    assert "3.5 (3 to 4)" in printed
