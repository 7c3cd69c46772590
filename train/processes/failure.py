"""How all processes of a run end when one of them fails: each within seconds, each with a line that says why.

A collective that a rank never joins cannot be interrupted from Python. So a thread of each process looks for news of a
failure in the store through which the processes met, and ends its process.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sharding.command import UserError, report, say

_KEY, _SAID = "parallax/failure", "parallax/said"
_SECONDS_BETWEEN_LOOKS = 0.5
_LOOKS = 6  # for the cause of a failed collective, which is noticed before its cause is told
_PATIENCE = 20  # looks for ranks that have not yet said why they end; one may be dead
EXIT_CODE = 2


class Failures:
    """What ``size`` ranks of ``command`` tell each other of their failures through ``store`` (of torch.distributed)."""

    def __init__(self, command: str, store: Any, rank: int, size: int) -> None:
        self._command, self._rank, self._size = command, rank, size
        self._store = store.clone()  # the original is locked while it waits for others
        self._ended = threading.Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """An error within the block is printed, told to the other ranks, and ends this process; theirs ends it too.

        Raises SystemExit once all ranks have said why they end: after the first to end, launchers end the others.
        """
        watcher = threading.Thread(target=self._watch, name="failures", daemon=True)
        watcher.start()
        try:
            yield
        except Exception as error:
            self._end(watcher)
            if _is_of_communication(error):
                code = report(self._command, UserError(self._cause(error)))
            else:
                code = report(self._command, error)
                self._tell(error)
            self._wait_for_others()
            raise SystemExit(code) from None
        self._end(watcher)

    def _end(self, watcher: threading.Thread) -> None:
        self._ended.set()
        watcher.join()

    def _watch(self) -> None:
        while not self._ended.wait(_SECONDS_BETWEEN_LOOKS):
            if news := self._news():
                say(self._command, news)
                self._wait_for_others()
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
        message = " ".join([f"rank {self._rank} failed: {reason}", *getattr(error, "__notes__", [])])
        with suppress(RuntimeError):  # nobody is there to be told
            self._store.compare_set(_KEY, "", message)

    def _wait_for_others(self) -> None:
        """To be called after this rank has said why it ends."""
        with suppress(RuntimeError):  # the store ended with a different rank
            self._store.add(_SAID, 1)
            for _ in range(_PATIENCE):
                if self._store.add(_SAID, 0) >= self._size:
                    break
                time.sleep(_SECONDS_BETWEEN_LOOKS)


def _is_of_communication(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(
        word in str(error).lower() for word in ("gloo", "nccl", "connection", "socket", "process group")
    )
