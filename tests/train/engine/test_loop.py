import weakref
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch

from train.engine.loop import Clock, StepDone, fit
from train.methods import Loss


def train(total: int, start: int = 0, stop_at: int | None = None) -> tuple[int, list[int], list[tuple[int, bool]]]:
    steps: list[int] = []
    told: list[tuple[int, bool]] = []

    def task(batch: Any, step: int) -> Loss:
        assert batch == step
        steps.append(step)
        return Loss(torch.zeros(()), {})

    def hook(state: StepDone) -> None:
        told.append((state.done, state.last))

    batches: Iterator[Any] = count(start)
    done = fit(task, batches, total, [hook, hook], lambda: len(steps) + start == stop_at, start)
    return done, steps, told[::2]


def test_a_run_has_all_its_steps_and_says_which_is_the_last() -> None:
    assert train(3) == (3, [0, 1, 2], [(1, False), (2, False), (3, True)])


def test_it_starts_anywhere_and_stops_after_the_step_at_hand() -> None:
    assert train(9, start=4, stop_at=6) == (6, [4, 5], [(5, False), (6, True)])
    assert train(4, start=4) == (4, [], [])


def test_an_error_says_in_which_step() -> None:
    def task(*_: object) -> Loss:
        raise KeyError("a fault of ours")

    batches: Iterator[Any] = count()
    with pytest.raises(KeyError) as raised:
        fit(task, batches, 9, [], lambda: False, start_step=4)
    assert raised.value.__notes__ == ["(in step 5)"]


def test_a_batch_is_gone_when_the_next_one_is_made() -> None:
    before = list[weakref.ref[Clock]]()

    class Batches:
        def __next__(self) -> Any:
            assert all(reference() is None for reference in before)
            before.append(weakref.ref(made := Clock()))
            return made

    batches: Any = Batches()
    assert fit(lambda *_: Loss(torch.zeros(()), {}), batches, 3, [lambda _: None], lambda: False) == 3


def test_pauses_are_counted_also_where_they_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([1.0, 3.0, 10.0, 15.0])
    monkeypatch.setattr("train.engine.loop.time.perf_counter", lambda: next(ticks))
    clock = Clock()
    with clock.pausing():
        pass
    with pytest.raises(OSError, match="full"), clock.pausing():
        raise OSError("full")
    assert clock.pause_seconds == 7.0
