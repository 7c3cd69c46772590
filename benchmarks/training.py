"""The train step alone, on batches that are there already, beside the same work in plain torch.

    python -m benchmarks.training --methods simclr byol optim.name=sgd
    python -m benchmarks.training --config 'configs/cifar10-resnet18-{}.yaml' optim.name=sgd --rounds 8

*plain* is a loop as one would write it by hand, with the loss in a few lines (`benchmarks.peers.steps`), *lightly* the
same loop with lightly's loss, where that is installed. All have the method's networks and initial weights. Ours also
takes the gradient's norm, watches for values that are not finite, and copies what the health board looks at.

Memory is the most that torch's allocator has given out at a time within a step, beyond what lies between steps.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from pathlib import Path

import torch

from benchmarks.measure import Rate, Results, interleave, peak_bytes, rate_of
from benchmarks.peers.steps import LOSSES, METHODS, PlainStep
from benchmarks.report import save, show
from benchmarks.stages import NUM_CACHED, Training, add_arguments, finish, parse, read_config
from pipeline.loader import Batch
from sharding.command import command
from sharding.manifest import open_shards
from train.config import Config
from train.engine.automatic import environment
from train.pretrain import build_loader
from train.processes.distributed import World


@command("benchmarks.training")
def main(arguments: Sequence[str] | None = None) -> int:
    options, start, results = parse(_parser(), arguments), environment(), {}
    pattern = str(options.config)
    with ExitStack() as stack:
        for method in options.methods:
            options.config = Path(pattern.format(method))
            config = read_config(options, stack)
            options.shards = config.data.shards
            results[method] = _measured(config, options)
    columns = ["method", "images/s", "of plain", "MiB"]
    title = f"the step alone, {config.encoder.name}, batches of {config.run.global_batch_size}; ± 95 %"
    show(title, columns, (row for method, found in results.items() for row in _rows(method, found)))
    if options.out:
        lines = [{"method": m, "contestant": n, **turn} for m, found in results.items() for n, turn in found.items()]
        save(options.out, start, lines)
    return 0


def _measured(config: Config, options: argparse.Namespace) -> Results:
    world, shards = (
        World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        open_shards(options.shards),
    )
    with build_loader(config, shards, world, 0) as loader:
        batches = cycle([next(loader) for _ in range(NUM_CACHED)])
    steps: dict[str, Callable[[Batch], object]] = {"ours": Training(config, shards, world)}
    for name, losses in LOSSES.items():
        try:
            steps[name] = _of_views(PlainStep(config, losses, world))
        except ImportError as error:
            print(f"left out {name}: {error}")

    def work(step: Callable[[Batch], object]) -> int:
        step(batch := next(batches))
        return len(batch.ids)

    turns = {name: partial(rate_of, partial(work, step), options.seconds, 2, finish) for name, step in steps.items()}
    results = interleave(turns, options.rounds)
    for name, step in steps.items():
        results[name]["peak_mib"] = Rate((peak_bytes(partial(work, step)) / 2**20,))
    return results


def _of_views(step: PlainStep) -> Callable[[Batch], object]:
    return lambda batch: step(batch.views)


def _rows(method: str, results: Results) -> list[list[str]]:
    plain = results["plain"]["images_per_second"]
    return [
        [
            f"{method}, {name}",
            str(rate := turn["images_per_second"]),
            rate.ratio(plain).decided(),
            f"{turn['peak_mib'].mean:.0f}",
        ]
        for name, turn in results.items()
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description="Measure the train step beside the same work in plain torch."
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME", help=f"of {', '.join(METHODS)}"
    )
    add_arguments(parser, rounds=5, seconds=3)
    parser.set_defaults(config=Path("configs/demo-{}.yaml"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
