"""The directory of a run, which one run writes to at a time."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sharding.command import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def run_directory(path: Path) -> Iterator[Path]:
    """The directory, made if need be, locked against other runs until the block ends.

    Raises UserError, which names who has the lock, or why the directory cannot be written to; also for a full disk
    within the block, of which the system does not say where it is.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"run.dir: {path} cannot be written to ({error.strerror}); choose a different one") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "a different process"
            raise UserError(
                f"run.dir: {path} is in use by {holder}, which may be left of a run whose launcher was killed; end it, "
                "or choose a different run.dir"
            ) from None
        except OSError as error:
            raise UserError(f"run.dir: {path} cannot be locked ({error.strerror}); choose a different disk") from None
        try:
            lock.truncate(0)
            os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            yield path
        except OSError as error:
            if error.filename or error.errno not in _FULL:
                raise
            raise UserError(f"run.dir: {path}: no space left; free some, then the same command continues") from None
