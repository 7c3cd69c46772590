import json
import logging
from pathlib import Path

import pytest

from train.curves import draw_curves, read_metrics, speed_limit


def record(step: int, speed: float = 100.0, **more: float) -> dict[str, float]:
    return {
        "step": step,
        "loss": 1.0,
        "images_per_second": speed,
        "data_wait_percent": 0.0,
        "learning_rate": 0.1,
        **more,
    }


def write(run: Path, *lines: str) -> None:
    (run / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


def test_a_torn_line_costs_that_line_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, json.dumps(record(1)), '{"step": 2, "loss": 5.', json.dumps(record(3)), "7")
    with caplog.at_level(logging.WARNING):
        assert [r["step"] for r in read_metrics(tmp_path)] == [1, 3]
    assert f"{tmp_path}/metrics.jsonl, line 2: not a whole record" in caplog.text
    assert "line 4" in caplog.text
    assert draw_curves(tmp_path).stat().st_size > 0


def test_the_intervals_after_a_start_do_not_set_the_axis() -> None:
    records = [record(1, 9000), record(2), record(3, 8000, resumed_at=2), record(4, 120)]
    assert speed_limit(records, "images_per_second") == pytest.approx(132)
    assert speed_limit(records[:1], "images_per_second") == pytest.approx(9900)
    assert speed_limit(records, "data_wait_percent") == 1
