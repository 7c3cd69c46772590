"""Images per second of the loader backends and of other loaders, and of the train step with and without them.

    python -m benchmarks.throughput                                        # generated images
    python -m benchmarks.throughput --shards /data/shards --threads 1 2 --peers all --step resnet18

All contestants make the same kind of views of the same samples, in interleaved rounds; our own make the same views.
A peer whose library lacks operations is said to make less.
An image counts once, however many views it has. ``decode-only`` (of --peers) is what no loader that decodes whole
images by libjpeg-turbo can exceed, ``decode-only-dali`` the same for DALI, on a GPU if there is one; ``synthetic`` is
what the rest of the program could use at most: a train step that is as fast with a real loader as with it is bound by
the network.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import interleave, rate_of
from benchmarks.peers import LEFT_OUT, PEERS, PeerOptions, build_peer
from benchmarks.report import save, show
from pipeline.backends import BACKENDS
from pipeline.loader import Loader
from pipeline.stats import bound
from pipeline.views import PRESETS, ViewSpec, flatten, preset
from sharding.command import UserError, command
from sharding.manifest import ShardSet, open_shards


@command("benchmarks.throughput")
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if "all" in options.peers:
        options.peers = list(PEERS)
    if options.rounds < 1 or options.seconds <= 0:
        raise UserError(f"expected --rounds >= 1 and --seconds > 0, found {options.rounds} and {options.seconds}")
    with ExitStack() as stack:
        shards = open_shards(options.shards or _generated_shards(stack))
        results = {"loader": _measure_loaders(options, shards)}
        if options.step:
            results["train_step"] = _measure_steps(options, shards)
    if options.out:
        save(options.out, "python -m benchmarks.throughput " + " ".join(arguments or sys.argv[1:]), results)
    return 0


def _measure_loaders(options: argparse.Namespace, shards: ShardSet) -> dict[str, Any]:
    with ExitStack() as stack:
        contestants: dict[str, Callable[[], float]] = {}
        # Peers first: their worker processes are forked, which is best done before there are threads.
        for peer, threads in product(options.peers, options.threads):
            contestants |= _enter_peer(options, shards, peer, threads, stack)
        for backend, threads in product(options.backends, options.threads):
            loader = stack.enter_context(_loader(options, shards, backend, threads))
            contestants[_label(backend, threads)] = partial(_loader_rate, loader, options)
        rates = interleave(contestants, options.rounds)
    title = f"loader: {options.views}, {options.batch_size} images a batch, {shards.manifest.num_samples} samples"
    show(title, "images/s", rates, _baseline(rates))
    return {name: rate.rounds for name, rate in rates.items()}


def _enter_peer(
    options: argparse.Namespace, shards: ShardSet, name: str, threads: int, stack: ExitStack
) -> dict[str, Callable[[], float]]:
    """A contestant, or none where the peer is not installed; says what it does not do."""
    try:
        peer = build_peer(name, PeerOptions(shards, flatten(_specs(options)), options.batch_size, threads, 2))
    except ImportError as error:
        print(f"left out {name}: {error}")
        return {}
    stack.callback(peer.close)
    if name in LEFT_OUT:
        print(f"{name} makes its views without {LEFT_OUT[name]}: its rate is an upper bound")
    # What was made ahead while other contestants ran is not this round's work.
    warmup = peer.num_ahead + 1
    return {_label(name, threads): partial(rate_of, peer.next_batch, options.seconds, warmup, finish=_finish)}


def _loader_rate(loader: Loader, options: argparse.Namespace) -> float:
    # What was prefetched while other contestants ran is not this round's work.
    warmup = options.prefetch + 1
    return rate_of(lambda: len(next(loader).labels), options.seconds, warmup, finish=_finish)


def _label(name: str, threads: int) -> str:
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def _measure_steps(options: argparse.Namespace, shards: ShardSet) -> dict[str, Any]:
    """Rates of the whole train step, fed by each backend and by the synthetic one, and what bounds each."""
    threads = max(options.threads)
    step = _build_step(options)
    bounds: dict[str, str] = {}
    with ExitStack() as stack:
        contestants: dict[str, Callable[[], float]] = {}
        for backend in dict.fromkeys([*options.backends, "synthetic"]):
            loader = stack.enter_context(_loader(options, shards, backend, threads))
            contestants[backend] = partial(_step_rate, step, loader, options, bounds, backend)
        rates = interleave(contestants, options.rounds)
    show(f"train step: SimCLR, {options.step}, fed by", "images/s", rates, "synthetic")
    for backend, sentence in bounds.items():
        print(f"{backend}: {sentence}")
    return {name: rate.rounds for name, rate in rates.items()} | {"bounds": bounds}


def _step_rate(
    step: Callable[[Loader], int], loader: Loader, options: argparse.Namespace, bounds: dict[str, str], name: str
) -> float:
    """Also notes what bounded the round, the last one's remains."""
    step(loader)
    before = loader.stats()
    rate = rate_of(partial(step, loader), options.seconds, warmup=0, finish=_finish)
    bounds[name] = bound(loader.stats() - before)
    return rate


def _build_step(options: argparse.Namespace) -> Callable[[Loader], int]:
    from train.engine.step import TrainStep
    from train.methods import build_method
    from train.methods.simclr import SimCLRConfig
    from train.model.draws import Draws
    from train.model.encoder import EncoderConfig
    from train.optim.optimizers import OptimConfig, build_optimizer
    from train.processes.distributed import World

    world = World(device=_device())
    method = build_method(SimCLRConfig(), EncoderConfig(name=options.step), world)
    method.to(world.device).to(memory_format=torch.channels_last)
    train_step = TrainStep(method, method, build_optimizer(OptimConfig(), method), _dtype())

    def step(loader: Loader) -> int:
        batch = next(loader)
        train_step(batch.views, Draws(0, batch.step, batch.ids), 0.01, 0.5)
        return len(batch.labels)

    return step


def _finish() -> None:
    """Wait for the device: also for batches that are prefetched on it, of which there are as many before and after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _loader(options: argparse.Namespace, shards: ShardSet, backend: str, threads: int) -> Loader:
    return Loader(
        shards,
        _specs(options),
        seed=0,
        global_batch_size=options.batch_size,
        backend=backend,
        num_threads=threads,
        prefetch=options.prefetch,
        device=_device(),
        dtype=_dtype(),
    )


def _specs(options: argparse.Namespace) -> tuple[ViewSpec, ...]:
    return preset(options.views, **({} if options.size is None else {"size": options.size}))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dtype() -> torch.dtype:
    """What training computes in on that device."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _generated_shards(stack: ExitStack) -> Path:
    """Shards of generated images in a temporary directory, for a first look without data."""
    from sharding.build import main as build

    directory = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "shards"
    print("no --shards: measuring on generated 96 px images; for figures that mean something pass real shards")
    if code := build(["--dataset", "demo", "--out", str(directory)]):
        raise UserError(f"the demo data set could not be built (exit code {code})")
    return directory


def _baseline(rates: dict[str, Any]) -> str:
    """What users know: an image folder; or our backend of the same operations."""
    known = [name for wanted in ("imagefolder", "torchvision") for name in rates if name.startswith(wanted)]
    return [*known, *rates][0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput", description="Compare the loader backends, interleaved, on equal work."
    )
    parser.add_argument("--shards", help="directory made by sharding.build (default: generated images)")
    parser.add_argument("--backends", nargs="+", choices=list(BACKENDS), default=["cpu", "dali", "torchvision"])
    parser.add_argument("--peers", nargs="*", choices=[*PEERS, "all"], default=[], help="other loaders, or all of them")
    parser.add_argument("--threads", nargs="+", type=int, default=[2], help="loader threads to try (default: 2)")
    parser.add_argument("--views", choices=list(PRESETS), default="simclr", help="views to make (default: simclr)")
    parser.add_argument("--size", type=int, help="side of all views, pixels (default: the preset's)")
    parser.add_argument("--batch-size", type=int, default=64, help="images a batch (default: 64)")
    parser.add_argument("--prefetch", type=int, default=2, help="batches in the making (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--seconds", type=float, default=4.0, help="timed seconds a round (default: 4)")
    parser.add_argument("--step", metavar="ENCODER", help="also time the SimCLR train step of resnet18, resnet50, ...")
    parser.add_argument("--out", type=Path, help="JSON file for the results, machine and versions")
    return parser


if __name__ == "__main__":
    sys.exit(main())
