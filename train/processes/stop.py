"""Ctrl-C, SIGTERM and SIGUSR1 ask a run to save and to end."""

import os
import signal
import time

from sharding.command import say

EXIT_CODE = 3  # of a run that was stopped and can be continued
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SAME_REQUEST_SECONDS = 1.0  # a terminal and torchrun may both pass on what was asked once


class StopRequest:
    """A flag that the loop reads at the end of each step; a second request ends the process. Use as a context."""

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._request) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: object) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
            say("train", f"{signal.Signals(number).name}: saving after this step; a second one ends at once")
        elif time.monotonic() - self._since > _SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
