"""How a run scales over processes: its loader, its train step, and both, in images/s and as an efficiency.

    python -m benchmarks.scaling run.global_batch_size=256 --config configs/imagenet-resnet50-simclr.yaml
    python -m benchmarks.scaling method.name=byol run.global_batch_size=32 --world-sizes 1 2 --predict

*Weak* scaling gives every process the batch of `run.global_batch_size`, *strong* divides it among them. Efficiency is
images/s over those of as many single processes. Every process is pinned to as many cores, at all world sizes: the
machine's over the largest of them. So a single process has no more than its share. World sizes take turns in each
round; each turn is a `torchrun` of its own.

The stages explain weak scaling in ms a step. *Apart* is the step in processes that do not talk: what shared memory and
caches cost. From there to the whole step: the slowest rank, for which the others wait; BatchNorm's collectives and the
gradients', each measured by leaving it out; and messages of the same number and sizes, sent when nothing else is done.
"""

import json
import operator
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.measure import Rate, Results, Turn, interleave
from benchmarks.predict import Link, predict
from benchmarks.rank import MESSAGES
from benchmarks.report import chart, save, show
from benchmarks.stages import add_arguments, parse, read_config
from sharding.command import Parser, UserError, command
from sharding.manifest import Manifest
from train.config import Config
from train.engine.automatic import environment, num_threads
from train.engine.plan import check_batch

STAGES = ("loader", "step", "end to end")


@command("benchmarks.scaling")
def main(arguments: Sequence[str] | None = None) -> int:
    options, start = parse(_parser(), arguments), environment()
    sizes = sorted({1, *options.world_sizes})
    with ExitStack() as stack:
        config = read_config(options, stack)
        scratch = Path(stack.enter_context(TemporaryDirectory()))
        cores = max(1, num_threads(0) // sizes[-1])
        data = config.data.model_copy(update={"num_threads": config.data.num_threads or cores})
        contestants = _contestants(config.model_copy(update={"data": data}), sizes)
        turns = {name: partial(_launch, name, *c, cores, options.seconds, scratch) for name, c in contestants.items()}
        results = interleave(turns, options.rounds)
    title = f"scaling of {config.method.name}, {config.encoder.name}; cores of each process: {cores}"
    _show_scaling(title, results)
    for name, turn in results.items():
        if "apart" in turn:
            _show_stages(name, turn, results["weak 1"])
    if options.predict:
        predict(results, Link(1e-6 * options.link[0], 1e9 * options.link[1]))
    if options.out:
        save(options.out, start, ({"contestant": name, **turn} for name, turn in results.items()))
    if options.picture:
        bars = {name: {stage: turn[stage] for stage in STAGES} for name, turn in results.items()}
        chart(options.picture, title, "images/s of all processes", bars)
    return 0


def _contestants(config: Config, sizes: Sequence[int]) -> dict[str, tuple[Config, int]]:
    """Configurations and world sizes by name. Raises UserError for those that cannot run on this machine."""
    if sizes[0] < 1 or (torch.cuda.is_available() and sizes[-1] > torch.cuda.device_count()):
        most = f"to the {torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "up"
        raise UserError(f"--world-sizes: expected numbers from 1 {most}, found {sizes[0]} to {sizes[-1]}")
    contestants = {}
    for size in sizes:
        note = " OVERSUBSCRIBED" if size > num_threads(0) else ""
        run = config.run.model_copy(update={"global_batch_size": config.run.global_batch_size * size})
        contestants[f"weak {size}{note}"] = config.model_copy(update={"run": run}), size
        if size > 1:
            contestants[f"strong {size}{note}"] = config, size
    for changed, size in contestants.values():
        check_batch(changed, Manifest.load(config.data.shards), size)
    return contestants


def _launch(name: str, config: Config, size: int, num_cores: int, seconds: float, scratch: Path) -> Turn:
    """A turn of as many processes, on a port that is free."""
    path, out = scratch / "config.yaml", scratch / "turn.json"
    path.write_text(config.to_yaml())
    torchrun = [sys.executable, *f"-m torch.distributed.run --standalone --nproc_per_node={size}".split()]
    explain = size > 1 and name.startswith("weak")
    rank = ["-m", "benchmarks.rank", *map(str, (path, out, num_cores, seconds, explain))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_cores)}
    done = subprocess.run([*torchrun, *rank], env=environment, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("benchmarks.scaling")] or [done.stderr]
        raise UserError(f"{name}: {said[0].partition(': ')[2] or said[0]}")
    return json.loads(out.read_text())


def _show_scaling(title: str, results: Results) -> None:
    single, rows = results["weak 1"], []
    for name, turn in results.items():
        for stage in STAGES:
            each = turn[stage].ratio(turn["size"])
            efficiency = each.ratio(single[stage]).decided() if turn is not single else "1"
            rows.append([f"{name}, {stage}", f"{turn['batch'].mean:.0f}", str(turn[stage]), str(each), efficiency])
    unit = "GPU" if torch.cuda.is_available() else "process"
    show(f"{title}; ± 95 %", ["processes", "batch", "images/s", f"per {unit}", "efficiency"], rows)


def _show_stages(name: str, turn: Mapping[str, Rate], single: Mapping[str, Rate]) -> None:
    """Of weak scaling: where the time of a step goes."""

    def ms(what: str, turn: Mapping[str, Rate] = turn) -> Rate:
        return turn["batch"].by_round(lambda batch, rate: 1000 * batch / rate, turn[what])

    rows = {"the step of a single process": ms("step", single), "apart": ms("apart"), "the whole step": ms("step")}
    rows["- what BatchNorm's collectives cost"] = ms("step").by_round(operator.sub, ms("local BatchNorm"))
    rows["- what averaging gradients costs"] = ms("step").by_round(operator.sub, ms("gradients not averaged"))
    seconds = {"- the slowest rank, once a step": turn["slowest_seconds"]}
    for what in MESSAGES:
        count, num_bytes = turn[f"{what}_messages"].mean, turn[f"{what}_bytes"].mean
        label = f"- alone, {what}: {count:.0f} messages of {num_bytes / 1000 / max(1, count):.3g} kB"
        seconds[label] = turn[f"{what}_seconds"]
    rows |= {label: rate.over(1 / 1000) for label, rate in seconds.items()}
    show(f"{name}: ms a step", ["", "± 95 %"], ([label, str(rate)] for label, rate in rows.items()))


def _parser() -> Parser:
    parser = Parser("python -m benchmarks.scaling", "Measure how loader, train step and both scale over processes.")
    sizes = [size for size in (1, 2, 4, 8) if size <= (torch.cuda.device_count() or num_threads(0))]
    parser.add_argument("--world-sizes", nargs="+", type=int, default=sizes, help="default: those that fit, of 1 2 4 8")
    parser.add_argument("--predict", action="store_true", help="also predict 8 to 4096 GPUs by a model, and check it")
    parser.add_argument(
        "--link", nargs=2, type=float, default=(10, 25), metavar=("US", "GB/S"), help="assumed latency and bandwidth"
    )
    add_arguments(parser, rounds=5, seconds=3)
    return parser


if __name__ == "__main__":
    sys.exit(main())
