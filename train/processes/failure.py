"""How all processes of a run end when one of them fails: each within seconds, each with a line that says why.

A collective that a rank never joins cannot be interrupted from Python. So a thread of each process looks for news of a
failure in the store through which the processes met, and ends its process.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sharding.command import UserError, report, say

_KEY = "parallax/failure"
_SECONDS_BETWEEN_LOOKS = 0.5
_LOOKS = 6  # for the cause of a failed collective, which is noticed before its cause is told
EXIT_CODE = 2


class StoppedByOtherRankError(UserError):
    """This rank ends because a different one failed."""


class Failures:
    """What the ranks of ``command`` tell each other of their failures through ``store`` (of torch.distributed)."""

    def __init__(self, command: str, store: Any, rank: int) -> None:
        self._command, self._rank = command, rank
        self._store = store.clone()  # the original is locked while it waits for others
        self._ended = threading.Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """An error within the block is printed, told to the other ranks, and ends this process; theirs ends it too.

        Raises SystemExit for an own error, which is printed before the others know and have the launcher end this
        process, and StoppedByOtherRankError for one that was only the consequence of a different rank's.
        """
        watcher = threading.Thread(target=self._watch, name="failures", daemon=True)
        watcher.start()
        try:
            yield
        except Exception as error:
            self._end(watcher)
            if _is_of_communication(error):
                raise StoppedByOtherRankError(self._cause(error)) from None
            code = report(self._command, error)
            self._tell(error)
            raise SystemExit(code) from None
        self._end(watcher)

    def _end(self, watcher: threading.Thread) -> None:
        self._ended.set()
        watcher.join()

    def _watch(self) -> None:
        while not self._ended.wait(_SECONDS_BETWEEN_LOOKS):
            if news := self._news():
                say(self._command, news)
                os._exit(EXIT_CODE)  # the main thread may hang in a collective for ever

    def _cause(self, error: Exception) -> str:
        """Of an error of communication: what a different rank says, which may take it a moment."""
        for _ in range(_LOOKS):
            if news := self._news():
                return news
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        reason = str(error).splitlines()[0]
        return f"stopped, because a different rank ended without saying why (killed? out of memory?): {reason}"

    def _news(self) -> str | None:
        try:
            if not self._store.check([_KEY]):
                return None
            return f"stopped, because {self._store.get(_KEY).decode()}"
        except RuntimeError:  # of the store's client: rank 0's process, which had the store, is gone
            return "stopped, because the connection to rank 0 was lost; see what it or the job's scheduler says"

    def _tell(self, error: BaseException) -> None:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        message = f"rank {self._rank} failed: {reason}"
        try:
            self._store.compare_set(_KEY, "", message)
            time.sleep(2 * _SECONDS_BETWEEN_LOOKS)  # the store may end with this process
        except RuntimeError:
            pass  # nobody is there to be told


def _is_of_communication(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(
        word in str(error).lower() for word in ("gloo", "nccl", "connection", "socket", "process group")
    )
