"""The model of `benchmarks.predict` against processes that talk over a slow link: an experiment.

    python -m tests.throttled_link --shards DIR --rate 1gbit --processes 2 run.global_batch_size=16

Each process is in a network namespace of its own, on a bridge, and sends at most at ``--rate`` (`tc`, token bucket).
For root, with `ip` and `tc`. ``run.global_batch_size`` is that of a process. See docs/benchmarks.md.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import Turn, interleave
from benchmarks.predict import modelled
from train.config import Config, load_config

_PREFIX = "plx"  # of namespaces and devices
_PORT = "29500"  # in a namespace where nobody else is


@contextmanager
def link(processes: int, rate: str) -> Iterator[None]:
    """Namespaces plx0, plx1, ... with the addresses 10.99.0.1, 10.99.0.2, ... on a device ``net0``."""

    def ip(words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words.split()], check=check)

    bridge = f"{_PREFIX}br"
    try:
        ip(f"link add {bridge} type bridge")
        ip(f"link set {bridge} up")
        for rank in range(processes):
            name = f"{_PREFIX}{rank}"
            ip(f"netns add {name}")
            ip(f"link add {name} type veth peer name net0 netns {name}")
            ip(f"link set {name} master {bridge} up")
            ip(f"-n {name} addr add 10.99.0.{rank + 1}/24 dev net0")
            ip(f"-n {name} link set lo up")
            ip(f"-n {name} link set net0 up")
            tc = f"tc -n {name} qdisc add dev net0 root tbf rate {rate} burst 256k latency 50ms"
            subprocess.run(tc.split(), check=True)
        yield
    finally:
        for rank in range(processes):
            ip(f"netns del {_PREFIX}{rank}", check=False)
        ip(f"link del {bridge}", check=False)


def turn(config: Config, processes: int, seconds: float, scratch: Path) -> Turn:
    """What `benchmarks.rank` measures."""
    path, out = scratch / "config.yaml", scratch / "turn.json"
    path.write_text(config.to_yaml())
    command = [sys.executable, "-m", "benchmarks.rank", *map(str, (path, out, 1, seconds, True))]
    meeting = {"MASTER_ADDR": "10.99.0.1", "MASTER_PORT": _PORT, "GLOO_SOCKET_IFNAME": "net0", "OMP_NUM_THREADS": "1"}
    meeting |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ranks = []
    for rank in range(processes):
        environment = {**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen(["ip", "netns", "exec", f"{_PREFIX}{rank}", *command], env=environment))
    if max([abs(rank.wait()) for rank in ranks]):
        sys.exit("a process failed, see its lines")
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    config = load_config(None, [*options.overrides, f"data.shards={options.shards}", "data.num_threads=1"])
    batch = config.run.global_batch_size * options.processes
    config = config.model_copy(update={"run": config.run.model_copy(update={"global_batch_size": batch})})
    with TemporaryDirectory() as scratch, link(options.processes, options.rate):
        run = partial(turn, config, options.processes, options.seconds, Path(scratch))
        found = interleave({options.rate: run}, options.rounds)[options.rate]
    model, step = modelled(found, overlap=0.0), found["batch"].ratio(found["step"])
    print(f"{options.processes} processes at {options.rate}: {model} s a step predicted, {step} measured")
    print(
        f"predicted / measured: {model.ratio(step).decided()}; a step apart: {found['batch'].ratio(found['apart'])} s"
    )


if __name__ == "__main__":
    main()
