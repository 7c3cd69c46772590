import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.measure import Rate, come_to_rest, interleave, interleaved_names, rate_of


def test_every_contestant_runs_once_a_round_and_rounds_turn_round() -> None:
    assert list(interleaved_names(["a", "b", "c"], 3)) == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]


def test_rates_are_kept_by_round() -> None:
    values = {"a": iter([1.0, 2.0, 9.0]), "b": iter([2.0, 4.0, 3.0])}
    rates = interleave({name: lambda it=it: next(it) for name, it in values.items()}, 3)  # type: ignore[misc]
    assert rates["a"].rounds == (1.0, 2.0, 9.0)
    assert rates["b"].ratio(rates["a"]).rounds == (2.0, 2.0, 3 / 9)
    assert rates["a"].median == 2.0
    assert str(rates["a"]) == "2 (1 to 9)"


def test_rounds_of_different_number_have_no_ratio() -> None:
    with pytest.raises(ValueError, match="zip"):
        Rate((1.0, 2.0)).ratio(Rate((1.0,)))


def test_the_rate_counts_units_after_the_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    calls: list[float] = []

    def work() -> int:
        nonlocal now
        now += 100.0 if len(calls) < 2 else 0.5  # the first calls are slow
        calls.append(now)
        return 10

    monkeypatch.setattr("time.perf_counter", lambda: now)
    assert rate_of(work, seconds=3.0, warmup=2) == 20.0
    assert len(calls) == 2 + 6


def test_the_rate_waits_for_the_device_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    now, queued = 0.0, 0

    def work() -> int:
        nonlocal now, queued
        now, queued = now + 0.25, queued + 1
        return 10

    def finish() -> None:
        nonlocal now, queued
        now, queued = now + queued, 0  # a second each

    monkeypatch.setattr("time.perf_counter", lambda: now)
    assert rate_of(work, seconds=1.0, warmup=3, finish=finish) == 40 / 5


def test_rest_is_waited_for_also_in_child_processes() -> None:
    """A child that computes for a while delays the return until it is done."""
    code = "import time\nend = time.process_time() + 0.6\nwhile time.process_time() < end: pass\ntime.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        with pytest.raises(TimeoutError, match="still computing"):
            come_to_rest(limit_seconds=0.3)
        come_to_rest()
        ticks = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        assert sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK") > 0.55
    finally:
        child.kill()
        child.wait()
