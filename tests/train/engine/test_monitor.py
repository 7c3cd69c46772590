import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from pipeline.stats import Stats
from train.engine.monitor import Monitor, progress_bar, read_metrics

_LOADER = Stats()
_METRICS = {"loss": 4.123, "learning_rate": 0.0312}


def test_pauses_are_no_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds and then five for ten steps of 128 images, of which six and one were pauses."""
    ticks = iter([100.0, 110.0, 115.0])
    monkeypatch.setattr("train.engine.monitor.time.perf_counter", lambda: next(ticks))
    with Monitor(tmp_path, 0, 100, 128, []) as monitor:
        monitor.log(10, _METRICS, Stats(wait_seconds=1.0), 6.0)
        monitor.log(20, _METRICS, Stats(wait_seconds=3.0), 7.0)
    first, second = read_metrics(tmp_path)
    for record, rate, wait, pause in ((first, 320.0, 25.0, 6.0), (second, 320.0, 50.0, 1.0)):
        assert record["images_per_second"] == pytest.approx(rate)
        assert record["data_wait_percent"] == pytest.approx(wait)
        assert record["pause_seconds"] == pause


def run_from(directory: Path, start: int, stop: int) -> None:
    with Monitor(directory, start, 100, 128, ["tensorboard"]) as monitor:
        for step in range(start + 1, stop + 1):
            monitor.log(step, _METRICS, _LOADER, 0.0)


def test_a_resumed_run_starts_on_a_line_of_its_own_and_says_so(tmp_path: Path) -> None:
    run_from(tmp_path, 0, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    run_from(tmp_path, 2, 4)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[3])["step"] == 3
    assert [(r["step"], r.get("resumed_at")) for r in read_metrics(tmp_path)] == [
        (1, None),
        (2, None),
        (3, 2),
        (4, None),
    ]


def test_a_run_that_was_killed_before_its_first_checkpoint_leaves_no_records(tmp_path: Path) -> None:
    run_from(tmp_path, 0, 4)
    run_from(tmp_path, 0, 2)
    assert [(r["step"], r.get("resumed_at")) for r in read_metrics(tmp_path)] == [(1, 0), (2, None)]


def test_tensorboard_keeps_the_point_of_the_resume_and_has_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {seed: 7}\n")
    run_from(tmp_path, 0, 4)  # was killed after step 4; the last checkpoint is of step 2
    run_from(tmp_path, 2, 5)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert "resumed_at" not in events.Tags()["scalars"]
    assert any(b"seed: 7" in event.tensor_proto.string_val[0] for event in events.Tensors("config/text_summary"))


@pytest.mark.parametrize("width", [40, 60, 80])
def test_the_bar_is_one_line(width: int) -> None:
    screen = io.StringIO()
    bar = progress_bar(Console(file=screen, width=width, force_terminal=True))
    text = "loss 4.123  1563.2 images/s  wait 0.5%  lr 0.0312"
    bar.add_task("pretrain", total=12000, completed=1000, text=text)
    bar.console.print(bar.get_renderable())
    (line,) = screen.getvalue().splitlines()
    assert "loss 4." in line
