import json
import logging
from pathlib import Path

import pytest

from train.engine.monitor import read_lines, read_metrics


def write(run: Path, *lines: str) -> None:
    (run / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


def test_a_torn_line_costs_that_line_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, '{"step": 1}', '{"step": 2, "loss": 5.', '{"step": 3}', "7", '{"loss": 1.0}')
    with caplog.at_level(logging.WARNING):
        assert [r["step"] for r in read_metrics(tmp_path)] == [1, 3]
    for number in (2, 4, 5):
        assert f"{tmp_path}/metrics.jsonl, line {number}: not a whole record" in caplog.text


def test_what_was_done_after_the_checkpoint_that_a_run_resumed_from_does_not_count(tmp_path: Path) -> None:
    done = [{"step": step, "loss": 1.0} for step in (10, 20, 30, 40)]
    again = [{"step": 25, "loss": 2.0, "resumed_at": 20}, {"step": 30, "loss": 2.0}]
    write(tmp_path, *(json.dumps(record) for record in [*done, *again]))
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(10, 1), (20, 1), (25, 2), (30, 2)]


def test_a_file_that_is_not_there_yet_has_no_records(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "evaluation.jsonl", "results") == ([], [])
