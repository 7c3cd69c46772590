"""Images per second: of our loader backends and of other loaders, and of a run with its loader and step apart.

    python -m benchmarks.throughput    # this machine, all that is installed
    python -m benchmarks.throughput method.name=byol run.global_batch_size=64 --shards /data/shards --threads 1 2

All contestants make the same kind of views of the same samples, in interleaved rounds; our own make the same views. An
image counts once, however many views it has. ``decode-only`` is what no loader that decodes whole images by
libjpeg-turbo can exceed, ``decode-only-dali`` the same for DALI, on a GPU if there is one; ``synthetic`` makes no
views, and costs what is left: copying and normalising.

Then the three numbers of a run: the loader alone, the train step alone on batches that are on the device already (the
ceiling), and both together. A run that trains end to end as fast as its step alone is bound by the network.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product

import torch

from benchmarks.energy import NOT_TOLD
from benchmarks.measure import Rate, Results, Turn, interleave, rate_of
from benchmarks.peers import PEERS, PeerOptions, build_peer
from benchmarks.report import chart, save, show
from benchmarks.stages import Training, add_arguments, device, finish, load, open_loader, parse, read_config
from pipeline.backends import BACKENDS
from pipeline.views import flatten
from sharding.command import Parser, UserError, command
from sharding.manifest import ShardSet, open_shards
from train.config import Config
from train.engine import automatic
from train.engine.automatic import environment
from train.engine.plan import check_batch
from train.processes.distributed import World

_ENERGY = "joules_per_1000_images"
_NO_LOADER = ("decode-only", "synthetic")  # how the names of contestants begin that make no views


@command("benchmarks.throughput")
def main(arguments: Sequence[str] | None = None) -> int:
    options, start = parse(_parser(), arguments), environment()
    with ExitStack() as stack:
        config = read_config(options, stack)
        shards = open_shards(config.data.shards)
        check_batch(config, shards.manifest, 1)
        threads = options.threads or [automatic.num_threads(config.data.num_threads)]
        loaders = _measure_loaders(options, config, shards, threads)
        run = {} if options.loaders_only else _measure_run(options, config, shards)
    if options.out:
        kinds = {"loader": loaders, "run": run}
        lines = [{"kind": kind, "contestant": name, **turn} for kind in kinds for name, turn in kinds[kind].items()]
        save(options.out, start, lines)
    if options.picture:
        bars = {name: {"loader": turn["images_per_second"]} for name, turn in loaders.items()}
        chart(options.picture, f"loaders, {len(flatten(config.views))} views an image", "images/s", bars)
    return 0


def _measure_loaders(options: argparse.Namespace, config: Config, shards: ShardSet, threads: Sequence[int]) -> Results:
    with ExitStack() as stack:
        contestants: dict[str, Callable[[], Turn]] = {}
        # Peers first: their worker processes are forked, which is best done before there are threads.
        for peer, count in product(PEERS if "all" in options.peers else options.peers, threads):
            contestants |= _enter_peer(options, config, shards, peer, count, stack)
        for backend, count in product(options.backends, threads):
            loader = stack.enter_context(open_loader(config, shards, backend=backend, num_threads=count))
            # What was prefetched while other contestants ran is not this round's work.
            work, warmup = partial(load, loader), config.data.prefetch + 1
            contestants[_label(backend, count)] = _turn(work, options.seconds, warmup)
        results = interleave(contestants, options.rounds)
    _show_loaders(f"loaders: {config.run.global_batch_size} of {shards.manifest.num_samples} samples a batch", results)
    return results


def _enter_peer(
    options: argparse.Namespace, config: Config, shards: ShardSet, name: str, threads: int, stack: ExitStack
) -> dict[str, Callable[[], Turn]]:
    """A contestant, or none where the peer is not installed or cannot read the shards."""
    peer_options = PeerOptions(shards, flatten(config.views), config.run.global_batch_size, threads, prefetch=2)
    try:
        peer = build_peer(name, peer_options, stack)
    except (ImportError, UserError) as error:
        print(f"left out {name}: {error}")
        return {}
    return {_label(name, threads): _turn(peer, options.seconds, peer_options.num_ahead + 1)}


def _turn(work: Callable[[], int], seconds: float, warmup: int) -> Callable[[], Turn]:
    """With the GPU memory, in GB, by which the turn's beginning exceeds its end: of the first, what it has taken."""

    def turn() -> Turn:
        free = _free_bytes()
        return {**rate_of(work, seconds, warmup, finish=finish), "gpu_gigabytes": (free - _free_bytes()) / 1e9}

    return turn


def _free_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def _label(name: str, threads: int) -> str:
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def _show_loaders(title: str, results: Results) -> None:
    rates = {name: turn["images_per_second"] for name, turn in results.items()}
    loaders = [name for name in rates if not name.startswith(_NO_LOADER)]
    ours = [name for name in loaders if name.split(",")[0] in BACKENDS]
    peers = [name for name in loaders if name not in ours]
    peer, ceiling = _fastest(peers, rates), _fastest([name for name in rates if name.startswith("decode-only")], rates)
    against = {column: rates[other] for column, other in (("x peer", peer), ("x decoding", ceiling)) if other}
    rows = []
    for name, turn in results.items():
        cpu, rate = turn["cpu_percent"], rates[name]
        cells = [str(rate), str(cpu.by_round(lambda c, r: 100 * r / c if c else math.nan, rate)), f"{cpu.mean:.0f}"]
        cells += [f"{max(turn['gpu_gigabytes'].rounds):.1f}"] if torch.cuda.is_available() else []
        cells += [str(turn[_ENERGY])] if _ENERGY in turn else []
        rows.append([name, *cells, *(rate.ratio(other).decided() for other in against.values())])
    told = any(_ENERGY in turn for turn in results.values())
    more = [*(["GPU GB"] if torch.cuda.is_available() else []), *(["J / 1000 images"] if told else [])]
    columns = ["", "images/s", "per busy core", "CPU %", *more, *against]
    show(f"{title}; ± 95 %", columns, sorted(rows, key=lambda row: -rates[row[0]].mean))
    print(f"peer: {peer or 'none'}; decoding: {ceiling or 'not measured'}; CPU: 100 % is one core")
    if not told:
        print(NOT_TOLD)
    if (best := _fastest(ours, rates)) and (other := _fastest([name for name in loaders if name != best], rates)):
        print(_verdict(best, other, rates[best].ratio(rates[other])))


def _fastest(names: Sequence[str], rates: dict[str, Rate]) -> str | None:
    return max(names, key=lambda name: rates[name].mean, default=None)


def _verdict(first: str, second: str, ratio: Rate) -> str:
    if abs(ratio.mean - 1) <= ratio.margin:
        return f"{first} and {second} cannot be told apart: ratio {ratio}"
    return f"{first} is {ratio} times as fast as {second}"


def _measure_run(options: argparse.Namespace, config: Config, shards: ShardSet) -> Results:
    """Loader, train step and both, of the configuration as it is."""
    training, ahead = Training(config, shards, World(device=device())), config.data.prefetch + 1
    with open_loader(config, shards) as loader:
        turns: dict[str, Callable[[], Turn]] = {
            "loader alone": _turn(partial(load, loader), options.seconds, ahead),
            "step alone": _turn(training.alone(loader), options.seconds, 2),
            "end to end": partial(training.end_to_end, loader, options.seconds, ahead),
        }
        results = interleave(turns, options.rounds)
    rates = {name: turn["images_per_second"] for name, turn in results.items()}
    rows = [[name, str(rate), rate.ratio(rates["step alone"]).decided()] for name, rate in rates.items()]
    title = f"a run of {config.method.name}, {config.encoder.name}, {config.run.global_batch_size} images; ± 95 %"
    show(title, ["", "images/s", "x step alone"], rows)
    wait = results["end to end"]["wait_percent"]
    print(f"end to end the step waits for data {wait} % of the time; `python -m benchmarks.doctor` says why")
    return results


def _parser() -> Parser:
    parser = Parser("python -m benchmarks.throughput", "Compare loaders, interleaved, on equal work; time a run.")
    add = parser.add_argument
    add("--backends", nargs="*", choices=list(BACKENDS), default=["cpu", "dali", "torchvision"], help="of ours")
    add("--peers", nargs="*", choices=[*PEERS, "all"], default=["all"], help="other loaders (default: all installed)")
    add("--threads", nargs="+", type=int, help="loader threads to try (default: as many as a run would use)")
    add("--loaders-only", action="store_true", help="do not time the train step")
    add_arguments(parser, rounds=5, seconds=2)
    return parser


if __name__ == "__main__":
    sys.exit(main())
