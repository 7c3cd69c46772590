"""The whole path in one command, on generated images: shard, pretrain, evaluate, look. ``make demo`` runs it."""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sharding.command import command

CONFIG = Path("configs/demo.yaml")


@command("train.demo")
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train.demo", description="Shard, pretrain, evaluate: everything, on generated images."
    )
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="shards go here (default: data/demo)")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="the run goes here (default: runs/demo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run (default: 0)")
    options = parser.parse_args(arguments)
    data, run = options.data, options.run
    commands = [
        *(f"sharding.build --dataset demo --split {split} --out {data}/{split}" for split in ("train", "test")),
        f"torch.distributed.run --standalone --nproc_per_node={num_processes()} -m train.pretrain --config {CONFIG} "
        f"data.shards={data}/train run.dir={run} run.seed={options.seed}",
        f"train.evaluate --checkpoint {run} --test {data}/test --protocol knn linear --untrained",
        f"train.report {run}",
    ]
    for step in commands:
        print(f"\n$ python -m {step}", flush=True)
        if code := _run([sys.executable, "-m", *shlex.split(step)]):
            print(f"train.demo: this command failed with exit code {code}", file=sys.stderr)
            return code
    print("\nThe table above: percent of the test images; chance is 10.")
    print(f"Look at {run}/report.html: curves, health, what the encoder saw.")
    print(f"TensorBoard: tensorboard --logdir {run}/tensorboard")
    return 0


def _run(command: Sequence[str]) -> int:
    """Its exit code. Ctrl-C reaches the command as well, which then saves and ends, and is waited for."""
    one_thread_each = {"OMP_NUM_THREADS": "1", **os.environ}  # on a laptop's cores, unless the user decided otherwise
    with subprocess.Popen(command, env=one_thread_each) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


def num_processes() -> int:
    """Two, or one for each GPU where there are fewer GPUs than that."""
    import torch

    return min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2


if __name__ == "__main__":
    sys.exit(main())
