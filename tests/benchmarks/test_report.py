import json
import os
import subprocess
from pathlib import Path

import pytest

from benchmarks.measure import Rate
from benchmarks.report import chart, save, show
from train.engine.automatic import environment


def test_the_environment_says_what_is_needed_to_judge_a_result() -> None:
    found = environment()
    assert found["cores"] == len(os.sched_getaffinity(0))
    assert {"torch", "torchvision", "numba", "simplejpeg", "webdataset"} <= found["libraries"].keys()
    assert found["cpu"]
    json.dumps(found)


def test_the_commit_is_that_of_the_checkout() -> None:
    root = Path(__file__).parent
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    commit = environment()["commit"]
    assert commit is None if not head else head.startswith(commit.removesuffix("-dirty"))


def test_results_are_saved_line_by_line_under_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.jsonl"
    save(path, environment(), [{"contestant": "cpu", "images_per_second": Rate((1.0, 2.0))}, {"contestant": "b"}])
    head, first, _ = (json.loads(line) for line in path.read_text().splitlines())
    assert head["command"].startswith("python -m benchmarks.")
    assert head["environment"]["python"].startswith("3.")
    assert first == {"contestant": "cpu", "images_per_second": [1.0, 2.0]}


def test_a_table_has_its_title_and_cells(capsys: pytest.CaptureFixture[str]) -> None:
    show("title", ["", "images/s"], [["slow", str(Rate((10.0, 20.0)))]])
    printed = capsys.readouterr().out
    assert "title" in printed
    assert "15 ± 64" in printed


def test_a_chart_is_drawn_also_of_one_round(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "x.png"
    chart(path, "title", "images/s", {"weak 1": {"loader": Rate((3.0,))}, "weak 2": {"loader": Rate((5.0,))}})
    assert path.read_bytes().startswith(b"\x89PNG")
