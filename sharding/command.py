"""One way for all commands to end: an error that the user can act on is one line, an error of ours is a traceback."""

import argparse
import contextlib
import functools
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

Main = Callable[..., int]  # of (arguments), by default those of the process
_PATIENCE_SECONDS = 30.0


class UserError(ValueError):
    """Something that the user can put right; the message says where, what was expected, what was found, what to do."""


class Parser(argparse.ArgumentParser):
    """Of a command. Says what is wrong in one line; ``--help`` has the rest, with the description's own lines."""

    def __init__(self, prog: str, description: str | None, epilog: str | None = None) -> None:
        super().__init__(prog, None, description, epilog, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def command(name: str) -> Callable[[Main], Main]:
    """Makes a ``main(arguments) -> exit code`` end properly.

    A `UserError` or an OSError (a full disk, a missing file) is printed as one line and is exit code 2, Ctrl-C is exit
    code 130; everything else is a fault of this program and keeps its traceback.
    """

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def run(*args: Any) -> int:
            try:
                return main(*args)
            except (UserError, OSError) as error:
                return report(name, error)
            except KeyboardInterrupt:
                say(name, "stopped by Ctrl-C")
                return 130

        return run

    return decorate


def report(name: str, error: Exception) -> int:
    """Print an error as its kind deserves, and return the exit code."""
    if not isinstance(error, UserError | OSError):
        traceback.print_exception(error)
        return 1
    say(name, str(error))
    return 2


def say(name: str, message: str) -> None:
    """A line of ``name`` on the standard error; under `torchrun` with the rank that has something to say."""
    rank = f" [rank {os.environ['RANK']}]" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print(f"{name}{rank}: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def announced(name: str, what: str) -> Iterator[None]:
    """Says, while the block runs on and on, that it waits for ``what``."""
    message = f"{what}: no answer for {_PATIENCE_SECONDS:g} s, still waiting; is the disk or the network there?"
    timer = threading.Timer(_PATIENCE_SECONDS, say, (name, message))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
