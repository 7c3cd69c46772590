from __future__ import annotations

import os
import signal
import threading

import pytest

from sharding.engine import in_process, processes


def test_engines_give_every_result_and_pass_errors_on() -> None:
    for engine in (in_process, processes(2)):
        assert sorted(engine(divide, 12, [1, 2, 3, 4])) == [3, 4, 6, 12]
        with pytest.raises(ZeroDivisionError):
            list(engine(divide, 12, [1, 0, 3]))


def divide(dividend: int, divisor: int) -> int:
    return dividend // divisor


def where(_: None, __: int) -> int:
    return os.getpid()


def test_workers_are_other_processes_and_gone_afterwards() -> None:
    threads = threading.active_count()
    found = set(processes(2)(where, None, range(20)))
    assert os.getpid() not in found
    for process in found:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert threading.active_count() <= threads


def test_ctrl_c_is_left_to_the_caller() -> None:
    assert list(processes(2)(blocks_sigint, None, range(4))) == 4 * [True]
    assert not blocks_sigint(None, 0)


def blocks_sigint(_: None, __: int) -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_results_can_be_left_unread() -> None:
    """Closing the iteration early ends the workers at once, whatever they are doing."""
    results = processes(2)(sleep, None, [0, 60, 60, 60])
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]


def sleep(_: None, seconds: int) -> int:
    threading.Event().wait(seconds)
    return seconds
