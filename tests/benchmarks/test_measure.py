import math
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from scipy import stats

from benchmarks.measure import Rate, come_to_rest, interleave, rate_of


def test_rates_are_kept_by_round_and_rounds_turn_round() -> None:
    values, order = {"a": iter([1.0, 2.0, 9.0]), "b": iter([2.0, 4.0, 3.0]), "c": iter([1.0] * 3)}, list[str]()

    def turn(name: str) -> dict[str, float]:
        order.append(name)
        return {"rate": next(values[name])}

    found = {name: results["rate"] for name, results in interleave({n: partial(turn, n) for n in values}, 3).items()}
    assert order == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]
    assert found["a"].rounds == (1.0, 2.0, 9.0)
    assert found["b"].ratio(found["a"]).rounds == (2.0, 2.0, 3 / 9)
    assert found["a"].mean == 4.0
    assert found["a"].over(2).rounds == (0.5, 1.0, 4.5)


@pytest.mark.parametrize("rounds", [(1.0, 2.0), (3.0, 3.5, 4.0, 2.0, 3.0), tuple(range(1, 12))])
def test_the_margin_is_that_of_students_t(rounds: tuple[float, ...]) -> None:
    low, high = stats.t.interval(0.95, len(rounds) - 1, np.mean(rounds), stats.sem(rounds))
    assert Rate(rounds).margin == pytest.approx((high - low) / 2, rel=1e-3)


def test_a_machine_too_noisy_to_decide_says_so_instead_of_a_number() -> None:
    assert Rate((1.0, 1.01, 0.99)).decided() == "1.00 ± 0.02"
    assert Rate((0.5, 1.0, 1.5)).decided() == "too noisy (± 1.2)"
    assert str(Rate((12000.0, 13000.0))) == "12500 ± 6400"
    assert Rate((1.0,)).decided() == "1.00 (one round)"
    assert str(Rate((800.0, math.nan))) == "unknown", "a turn too short for the clock of processes"


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
    assert rate_of(work, seconds=3.0, warmup=2)["images_per_second"] == 20.0
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
    assert rate_of(work, seconds=1.0, warmup=3, finish=finish)["images_per_second"] == 40 / 5


def test_the_cores_that_work_keeps_busy_are_told_from_waiting() -> None:
    def compute() -> int:
        end = time.process_time() + 0.3  # 30 ticks of the clock that is read
        while time.process_time() < end:
            pass
        return 1

    before = time.process_time()
    turn = rate_of(compute, seconds=0.0, warmup=0)
    busy = turn["cpu_percent"] / 100 / turn["images_per_second"]  # seconds of a core
    assert busy == pytest.approx(time.process_time() - before, abs=0.05)


def test_looking_whether_others_rest_is_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it takes: here, what this thread does instead of sleeping."""

    def look(_: float) -> None:
        end = time.thread_time() + 0.1
        while time.thread_time() < end:
            pass

    monkeypatch.setattr("time.sleep", look)
    come_to_rest(limit_seconds=1.0)


_BURN = """if True:
    import sys, time
    for _ in sys.stdin:
        end = time.process_time() + 0.1
        while time.process_time() < end: pass
        print(flush=True)
"""


def test_rest_is_waited_for_also_in_child_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that computes during the first waits delays the return, one that goes on is an error."""
    child = subprocess.Popen([sys.executable, "-c", _BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    busy = 0

    def wait(_: float) -> None:
        """The child's 0.1 s of computing, however long it takes on a busy machine."""
        nonlocal busy
        busy -= 1
        if busy >= 0:
            print(file=child.stdin, flush=True)
            child.stdout.readline()  # type: ignore[union-attr]

    monkeypatch.setattr("time.sleep", wait)
    with child:
        busy = 1000
        with pytest.raises(TimeoutError, match="still computing"):
            come_to_rest(limit_seconds=0.3)
        busy = 3
        come_to_rest()
        assert busy < 0
        child.stdin.close()
