"""A Python that forks: `python -m MODULE` and `python FILE`, by a process that has imported everything.

It is for commands that start processes by `sys.executable`, whose imports take 5 to 10 s each. In its place stands a
small program, which hands its arguments, environment, directory and files to a server that forks, passes signals on,
and ends as the fork ends. A fork's own `sys.executable` is that program, too, so torchrun's ranks are forks.
"""

import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

_PROGRAM = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
    signal.signal(number, lambda number, _: server.send(bytes([number])))
given = json.dumps([sys.argv, os.getcwd(), dict(os.environ)])
socket.send_fds(server, [given.encode()], [0, 1, 2])
code = int(server.recv(16) or -signal.SIGKILL)
if code < 0:
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def write_program(path: Path, address: str) -> None:
    path.write_text(_PROGRAM.format(python=sys.executable, address=address))
    path.chmod(0o755)


def serve(address: str) -> None:
    """Never returns but in forks, to end them as a program ends."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(f"{address}.new")
    listener.listen(64)
    Path(f"{address}.new").rename(address)  # from now on programs may connect
    for module in ("benchmarks.rank", "torch.distributed.run", "train.evaluate.__main__", "train.verify"):
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait for the forks
    while True:
        connection, _ = listener.accept()
        if not os.fork():
            break
        connection.close()
    listener.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
    child = os.fork()
    if child:
        for file in files:
            os.close(file)
        _wait(child, connection)
        os._exit(0)
    connection.close()
    words, directory, environment = json.loads(message)
    _run(words, directory, environment, files)


def _wait(child: int, connection: socket.socket) -> None:
    """For the end of a fork, to which signals are passed on; it does not outlive the program."""
    ended = os.pidfd_open(child)
    watched: list[Any] = [ended, connection]
    while ended not in select.select(watched, [], [])[0]:
        number = connection.recv(1)
        os.kill(child, number[0] if number else signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    connection.send(str(os.waitstatus_to_exitcode(status)).encode())


def _run(words: list[str], directory: str, environment: dict[str, str], files: list[int]) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(directory)
    os.environ.clear()
    os.environ |= environment
    sys.executable, *words = (word for word in words if word != "-u")
    is_module = words[0] == "-m"
    sys.argv = words[is_module:]
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # the module is imported already
    if is_module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")
