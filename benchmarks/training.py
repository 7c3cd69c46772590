"""The train step alone, on batches that are there already, beside the same work in a plain loop.

    python -m benchmarks.training --config configs/demo-byol.yaml
    python -m benchmarks.training --config configs/imagenet-vicreg.yaml optim.name=sgd run.global_batch_size=256

*plain* is a loop as one would write it by hand, with the method's networks and loss (`benchmarks.peers.steps`).
*lightly* is the same with lightly's loss, where it is installed and has one. Beyond them ours can take a batch in
pieces, stops at gradients that are not finite, and copies what the health board looks at. Memory is the most that
torch's allocator has given out at a time within a step, beyond what lies between steps.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import cycle

from benchmarks.measure import Rate, Results, interleave, peak_bytes, rate_of
from benchmarks.peers.steps import PlainStep, lightly
from benchmarks.report import save, show
from benchmarks.stages import NUM_CACHED, Training, add_arguments, device, finish, parse, read_config
from pipeline.loader import Batch
from sharding.command import Parser, UserError, command
from sharding.manifest import open_shards
from train.config import Config
from train.engine.automatic import environment
from train.pretrain import build_loader
from train.processes.distributed import World


@command("benchmarks.training")
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser("python -m benchmarks.training", "Measure the train step beside the same work in a plain loop.")
    add_arguments(parser, rounds=5, seconds=3)
    options, start = parse(parser, arguments), environment()
    with ExitStack() as stack:
        config = read_config(options, stack)
        results = _measured(config, options)
    rates = {name: turn["images_per_second"] for name, turn in results.items()}
    per_cpu = {name: rate.ratio(results[name]["cpu_percent"].over(100)) for name, rate in rates.items()}
    rows = []
    for name, turn in results.items():
        ratios = [(kind[name], kind[name].ratio(kind["plain"])) for kind in (rates, per_cpu)]
        texts = [text for rate, ratio in ratios for text in (str(rate), ratio.decided())]
        rows.append([name, *texts, f"{turn['peak_mib'].mean:.0f}"])
    title = f"the step alone: {config.method.name}, {config.encoder.name}, batches of {config.run.global_batch_size}"
    show(title, ["± 95 %", "images/s", "of plain", "per CPU s", "of plain", "peak MiB"], rows)
    if options.out:
        save(options.out, start, ({"contestant": name, **turn} for name, turn in results.items()))
    return 0


def _measured(config: Config, options: argparse.Namespace) -> Results:
    world, shards = World(device=device()), open_shards(config.data.shards)
    with build_loader(config, shards, world, 0) as loader:
        batches = cycle([next(loader) for _ in range(NUM_CACHED)])
    steps: dict[str, Callable[[Batch], object]] = {
        "ours": Training(config, shards, world),
        "plain": PlainStep(config, world),
    }
    try:
        steps["lightly"] = PlainStep(config, world, lightly)
    except (ImportError, UserError) as error:
        print(f"left out lightly: {error}")

    def work(step: Callable[[Batch], object]) -> int:
        step(batch := next(batches))
        return len(batch.ids)

    turns = {name: partial(rate_of, partial(work, step), options.seconds, 2, finish) for name, step in steps.items()}
    results = interleave(turns, options.rounds)
    for name, step in steps.items():
        results[name]["peak_mib"] = Rate((peak_bytes(partial(work, step)) / 2**20,))
    return results


if __name__ == "__main__":
    sys.exit(main())
