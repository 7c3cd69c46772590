"""What bounds a run on this machine, what would lift it, and whether it does.

    python -m benchmarks.doctor --config configs/demo.yaml --shards DIR --apply tuned.yaml

Every stage is measured alone. Four limits follow: of storage, of the loader's threads, of the cores, of the training
thread; the largest part of the lowest bounds the run. Then loader and step are measured beside each other, neither
waiting for the other, which says what they take from each other, and with that how fast the run will be. So a cure's
rate is predicted before it is run (that of a different form of the images, on a sample), in turns with the run as it
is. ``synthetic`` is a loader without costs: no cure of the loader can give more.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import ceilings
from benchmarks.generated import temporary_directory, temporary_shards
from benchmarks.measure import Rate, Results, Turn, interleave, rate_of
from benchmarks.peers import PeerOptions, build_peer
from benchmarks.report import chart, save, show
from benchmarks.stages import Training, add_arguments, device, finish, load, open_loader, parse, read_config
from pipeline.loader import Loader
from pipeline.reading.reader import Reader
from pipeline.stats import thread_shares
from pipeline.views import flatten
from sharding.command import Parser, UserError, command
from sharding.manifest import ShardSet, open_shards
from train.config import Config, load_config
from train.engine import automatic
from train.engine.plan import check_batch
from train.processes.distributed import World

STEP, READING, OWN = "the train step", "reading", "normalising"
_OF_THREADS = (READING, "decoding", "resizing", "changing colours")  # a loader thread's time, see `thread_shares`
_WORTH = 1.05  # the least gain for which a cure is run, and taken
_SAMPLE = 256  # images that are built in a different form, with options of sharding.build
_FORMS = {"a short side of 320 px": ("--short-side", "320"), "decode-free shards": ("--decode-free",)}


@dataclass(frozen=True)
class Variant:
    """A way to run: as it is, or with other settings of ``data``, other shards, or so many threads of torch."""

    name: str
    shards: ShardSet
    data: dict[str, Any]
    torch_threads: int
    command: str = ""  # that makes the shards

    @property
    def num_threads(self) -> int:
        return self.data["num_threads"] + self.torch_threads

    @property
    def stages(self) -> tuple[str, str, str]:
        """What its costs are called among those measured alone: the loader's, the step's, reading's."""
        where, data = self.shards.directory, self.data
        loader = f"{data['backend']}, window {data['window']}, {where}"
        return loader, f"step, {self.torch_threads} threads", f"reading, {data['num_threads']} threads, {where}"


@command("benchmarks.doctor")
def main(arguments: Sequence[str] | None = None) -> int:
    options, start = parse(_parser(), arguments), automatic.environment()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        config = read_config(options, stack)
        shards = open_shards(config.data.shards)
        check_batch(config, shards.manifest, 1)
        if not shards.directory.is_local:
            raise UserError(f"{shards.directory}: expected a local directory, whose storage can be measured; copy some")
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        cold = options.cold or sum(shard.num_bytes for shard in shards.manifest.shards) > memory
        as_it_is, *cures = variants(config, shards, ceilings.cores(options.seconds), cold, stack)
        training = Training(config, shards, World(device=device()))
        model = Model(measure_alone([as_it_is, *cures], training, config, options, cold), cold)
        chosen = diagnose(model, as_it_is, cures)
        runs = measure_runs(chosen, training, config, options, cold)
    report(model, chosen, runs, options.picture)
    if options.out:
        save(options.out, start, ({"contestant": name, **turn} for name, turn in {**model.alone, **runs}.items()))
    if options.apply:
        apply(options, fastest(chosen, runs), as_it_is)
    return 0


def variants(config: Config, shards: ShardSet, cores: float, cold: bool, stack: ExitStack) -> list[Variant]:
    """The run as it is, with a loader without costs, and with each cure."""
    backend = "cpu" if config.data.backend == "auto" and not torch.cuda.is_available() else config.data.backend
    threads, num_cores = automatic.num_threads(config.data.num_threads), max(1, math.ceil(cores - 0.25))
    now = {"backend": backend, "num_threads": threads, "prefetch": config.data.prefetch, "window": config.data.window}
    as_it_is = Variant("as it is", shards, now, torch.get_num_threads())
    found = [as_it_is, replace(as_it_is, name="synthetic", data={**now, "backend": "synthetic"})]
    jpeg = not shards.manifest.is_decode_free
    backends = ("cpu", "dali") if jpeg or torch.cuda.is_available() else ("cpu",)  # of planes, both are one on a CPU
    counts = [min(many * num_cores, 1024) for many in (1, 16)]  # what a configuration may have, as the 64 batches
    for backend, count in product(backends, counts):
        prefetch = min(64, max(config.data.prefetch, 1 + count // config.run.global_batch_size))
        found.append(_with(as_it_is, backend=backend, num_threads=count, prefetch=prefetch))
    if cold and config.data.window is None:
        found.append(_with(as_it_is, window=2))
    enough = {num_cores} if torch.cuda.is_available() else {num_cores, 1}  # several wait for each other
    fewer = sorted(count for count in enough if count < as_it_is.torch_threads)
    found += [replace(as_it_is, name=f"OMP_NUM_THREADS={count}", torch_threads=count) for count in fewer]
    for name, flags in _FORMS.items() if jpeg else ():
        directory = temporary_directory(stack, shards)
        disk = "a different" if directory.stat().st_dev != shards.root.stat().st_dev else "the same"
        print(f"{name}: a sample is built in {directory}, on {disk} disk")
        encoded = _sample(shards, config)
        sample = open_shards(temporary_shards(directory, encoded, shards.manifest.num_lanes, *flags))
        build = f"python -m sharding.build --dataset {shards.directory} --out DIR {' '.join(flags)}"
        found.append(replace(as_it_is, name=name, shards=sample, command=build))
    return [v for v in found if v.name]


def _with(variant: Variant, **changes: Any) -> Variant:
    """Named by what is different; "" where nothing is."""
    name = " ".join(f"data.{key}={value}" for key, value in changes.items() if value != variant.data[key])
    return replace(variant, name=name, data={**variant.data, **changes})


def _sample(shards: ShardSet, config: Config) -> list[bytes]:
    """Encoded images, enough for two batches."""
    count = min(len(shards.index), max(_SAMPLE, 2 * config.run.global_batch_size))
    drawn = np.random.default_rng(0).choice(len(shards.index), count, replace=False)
    with closing(Reader(shards)) as reader:
        return [reader.read(sample).tobytes() for sample in drawn.tolist()]


def measure_alone(
    variants: Sequence[Variant], training: Training, config: Config, options: argparse.Namespace, cold: bool
) -> Results:
    """Every stage by itself, each kind once: loaders with one thread, the step on batches that are there."""
    seconds, batch, shards = options.seconds, config.run.global_batch_size, variants[0].shards
    dtype = automatic.dtype(config, World(device=device()))
    turns: dict[str, Callable[[], Turn]] = {
        "cores": lambda: {"cores": ceilings.cores(seconds)},
        "machine": lambda: ceilings.arithmetic(device(), dtype, seconds / 4),
    }
    with open_loader(config, shards) as first:
        step = training.alone(first)  # batches of all variants have the same shapes
    asked = ceilings.asked(step)
    with ExitStack() as stack:
        for peer in () if shards.manifest.is_decode_free else ("decode-only", "decode-only-dali"):
            work = build_peer(peer, PeerOptions(shards, flatten(config.views), batch, 1, 2), stack)
            turns[peer] = partial(rate_of, work, seconds, 3, finish)
        for v in variants:
            loader_stage, step_stage, reading_stage = v.stages
            if loader_stage not in turns:
                loader = stack.enter_context(open_loader(config, v.shards, **{**v.data, "num_threads": 1}))
                turns[loader_stage] = partial(_loader_turn, loader, v, seconds, cold)
            if step_stage not in turns:
                turns[step_stage] = partial(_step_turn, step, asked, v, seconds)
            if v.data["backend"] != "synthetic":
                turns[reading_stage] = partial(ceilings.reading, v.shards, v.data["num_threads"], seconds)
                whole = stack.enter_context(open_loader(config, v.shards, **v.data))
                turns[f"{v.name}, both"] = partial(_both_turn, whole, step, v, seconds, cold)
        return interleave(turns, options.rounds)


def _loader_turn(loader: Loader, v: Variant, seconds: float, cold: bool) -> Turn:
    """Seconds of an image: of a loader thread, of processors, and by stage."""
    if cold:
        ceilings.forget(v.shards)
    work = partial(load, loader)
    rate_of(work, 0, v.data["prefetch"] + 1)
    before = loader.stats()
    turn = _seconds(rate_of(work, seconds, 0, finish))
    spent = loader.stats() - before
    shares = {**thread_shares(spent), OWN: (spent.copy_seconds + spent.plan_seconds) / spent.seconds}
    return turn | {name: share * turn["seconds"] for name, share in shares.items()}


def _step_turn(step: Callable[[], int], asked: Turn, v: Variant, seconds: float) -> Turn:
    torch.set_num_threads(v.torch_threads)
    return {**_seconds(rate_of(step, seconds, 2, finish)), **asked}


def _both_turn(loader: Loader, step: Callable[[], int], v: Variant, seconds: float, cold: bool) -> Turn:
    """Images/s of the loader, whose batches are dropped, beside those of the step, on batches that are there."""
    torch.set_num_threads(v.torch_threads)
    if cold:
        ceilings.forget(v.shards)

    def load_apart() -> Turn:
        with torch.cuda.stream(torch.cuda.Stream() if torch.cuda.is_available() else None):  # waits for no step
            return rate_of(partial(load, loader), seconds, v.data["prefetch"] + 1, _finish_stream)

    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load_apart)
        start, images = time.perf_counter(), 0
        while not loading.done():
            images += step()
        finish()
        return {"loader": loading.result()["images_per_second"], "step": images / (time.perf_counter() - start)}


def _finish_stream() -> None:
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


def _seconds(turn: Turn) -> dict[str, float]:
    rate = turn["images_per_second"]
    return {"seconds": 1 / rate, "cpu_seconds": max(turn["cpu_percent"], 0.1) / 100 / rate}  # ticks are 10 ms


@dataclass(frozen=True)
class Model:
    """What follows from the stages alone; ``cold``: every pass reads from the disk."""

    alone: Results
    cold: bool

    def limits(self, v: Variant) -> dict[str, Rate]:
        """Images/s that a run cannot exceed, by what does not let it."""
        loader, step, reading = (self.alone.get(stage, {}) for stage in v.stages)
        cpu, threads = (loader["cpu_seconds"], step["cpu_seconds"]), v.data["num_threads"]
        found = {
            f"{threads} loader threads": loader["seconds"].by_round(lambda s: threads / s),
            "the cores": self.alone["cores"]["cores"].by_round(lambda cores, *cpu: cores / sum(cpu), *cpu),
            "the training thread": step["seconds"].by_round(lambda *s: 1 / sum(s), loader[OWN]),
        }
        if v.data["backend"] != "synthetic":
            kind = f"{'cold' if self.cold else 'warm'} {'sequential' if v.data['window'] else 'random'}"
            found["storage"] = reading[kind]
        return found

    def predicted(self, v: Variant) -> Rate:
        """Images/s, by what loader and step make alone and beside each other."""
        limits, both = self.limits(v), self.alone.get(f"{v.name}, both")
        cores, loader = self.alone["cores"]["cores"], self.alone[v.stages[0]]
        apart = {**limits, "the cores": cores.ratio(loader["cpu_seconds"])}
        alone = apart.pop("the training thread")
        if both is None:  # the loader costs nothing
            return alone

        def rate(beside: float, step: float, own: float, step_alone: float, *loader_alone: float) -> float:
            step = 1 / (1 / step + own)  # what the loader's thread did there, the training thread does in a run
            if beside < step:
                return _shared(min(loader_alone), beside, step)
            return _shared(step_alone, step, beside)

        found = both["loader"].by_round(rate, both["step"], loader[OWN], alone, *apart.values())
        return found.by_round(min, *limits.values())

    def bottleneck(self, v: Variant) -> tuple[str, str]:
        """What is used up first, and the largest part of it."""
        limits, loader, step = self.limits(v), self.alone[v.stages[0]], self.alone[v.stages[1]]
        lowest = min(limits, key=lambda name: limits[name].mean)
        parts = {name: loader[name].mean for name in _OF_THREADS}
        if lowest == "the training thread":
            parts = {OWN: loader[OWN].mean, STEP: step["seconds"].mean}
        elif lowest == "the cores":  # which a thread that waits for a disk does not need
            parts |= {READING: 0, OWN: loader[OWN].mean, STEP: step["cpu_seconds"].mean}
        return lowest, READING if lowest == "storage" else max(parts, key=lambda name: parts[name])


def _shared(alone: float, slow: float, fast: float) -> float:
    """The rate r of the slower of two, which waits for nothing: it has ``slow`` while the other works, for r / ``fast``
    of the time, and ``alone`` otherwise."""
    return alone / (1 + (alone - slow) / fast)


def diagnose(model: Model, as_it_is: Variant, cures: Sequence[Variant]) -> list[Variant]:
    """Print the stages, what bounds the run, and what cures would give. Returns the run as it is and the cures to run:
    nothing where noise decides."""
    _show_stages(model, as_it_is)
    lowest, part = model.bottleneck(as_it_is)
    limit, cores, now = model.limits(as_it_is)[lowest], model.alone["cores"]["cores"], model.predicted(as_it_is)
    if limit.is_noisy or now.is_noisy or cores.is_noisy:
        found = f"{now} images/s, at most {limit} ({lowest}), {cores} cores"
        print(f"too noisy to say what bounds the run: {found}; stop other work on this machine")
        return []
    print(f"{part} bounds this run at {now} images/s ({lowest}); {cores} cores are there")
    if now.ratio(limit).mean * _WORTH < 1:
        print(f"loader and step hold each other up: apart they would allow {limit} images/s")
    chosen = [as_it_is]
    for cure in cures:
        gain = model.predicted(cure).ratio(now)
        fewer = cure.data["backend"] == as_it_is.data["backend"] and cure.num_threads < as_it_is.num_threads
        oversubscribed = fewer and lowest == "the cores" and gain.mean * _WORTH > 1
        if oversubscribed:
            print(f"oversubscribed: {cure.name} would do")
        if oversubscribed or gain.mean >= _WORTH or cure.data["backend"] == "synthetic":
            chosen.append(cure)
            print(f"  {cure.name}: {model.predicted(cure)} images/s predicted, x {gain.decided()}  {cure.command}")
    return chosen


def _show_stages(model: Model, v: Variant) -> None:
    loader, step, reading = (model.alone.get(stage, {}) for stage in v.stages)
    rates = {name: turn["images_per_second"] for name, turn in model.alone.items() if name.startswith("decode-only")}
    rates |= {f"reading, {name}": rate for name, rate in reading.items()}
    seconds = {f"a loader thread: {name}": loader[name] for name in _OF_THREADS if loader[name].mean}
    seconds |= {"a loader thread": loader["seconds"], OWN: loader[OWN], STEP: step["seconds"]}
    rates |= {name: time.by_round(lambda s: 1 / s) for name, time in seconds.items()}
    show("each stage alone; ± 95 %", ["", "images/s"], [[name, str(rate)] for name, rate in rates.items()])
    machine = model.alone["machine"]
    for what, ceiling in (("FLOP", "matmul"), ("FLOP", "data sheet"), ("bytes", "copy")):
        if ceiling in machine:
            share = step[what].ratio(step["seconds"]).ratio(machine[ceiling])
            print(f"the step: {share.decided()} of the {what}/s of the {ceiling} ({machine[ceiling].over(1e9)} G/s)")
    if "upload" in machine:
        print(f"copying to the GPU: {machine['upload'].over(1e9)} GB/s")


def measure_runs(
    variants: Sequence[Variant], training: Training, config: Config, options: argparse.Namespace, cold: bool
) -> Results:
    """Training end to end, in turns."""

    def run(loader: Loader, v: Variant) -> Turn:
        torch.set_num_threads(v.torch_threads)
        if cold:
            ceilings.forget(v.shards)
        return training.end_to_end(loader, options.seconds, v.data["prefetch"] + 1)

    with ExitStack() as stack:
        loaders = {v.name: stack.enter_context(open_loader(config, v.shards, **v.data)) for v in variants}
        return interleave({v.name: partial(run, loaders[v.name], v) for v in variants}, options.rounds)


def report(model: Model, chosen: Sequence[Variant], runs: Results, picture: Path | None) -> None:
    bars, rows = {}, []
    for v in chosen:
        predicted, measured = model.predicted(v), runs[v.name]["images_per_second"]
        bars[v.name] = {"predicted": predicted, "measured": measured}
        gain = measured.ratio(bars[chosen[0].name]["measured"])
        rows.append([v.name, str(predicted), str(measured), predicted.ratio(measured).decided(), gain.decided()])
    if chosen:
        show("training, images/s; ± 95 %", ["", "predicted", "measured", "ratio", "measured gain"], rows)
    if chosen and picture:
        chart(picture, "training", "images/s", bars)


def fastest(chosen: Sequence[Variant], runs: Results) -> Variant:
    """By measurement, of the settings among them; the run as it is where none is surely faster. Prints what was faster
    and is no setting. Raises UserError where noise has decided."""
    if not chosen:
        raise UserError("--apply: expected a machine quiet enough to measure, found none; nothing is written")
    best, least, others = chosen[0], _WORTH, dict[str, Rate]()
    for v in chosen[1:]:
        gain = runs[v.name]["images_per_second"].ratio(runs[chosen[0].name]["images_per_second"])
        surely = gain.mean > _WORTH and (len(gain.rounds) == 1 or gain.mean - gain.margin > 1)
        if not surely or v.data["backend"] == "synthetic":
            continue
        if v.data == chosen[0].data:  # other shards, or threads of torch
            others[v.name] = gain
        elif gain.mean > least:
            best, least = v, gain.mean
    for name, gain in others.items():
        if gain.mean > least:
            print(f"{name}, which is not a setting, was faster: x {gain.decided()}")
    return best


def apply(options: argparse.Namespace, best: Variant, as_it_is: Variant) -> None:
    """Write the configuration that was given with what ``best`` has changed."""
    shards = [f"data.shards={options.shards}"] if options.shards else []
    config = load_config(options.config, [*options.overrides, *shards])
    changed = {name: value for name, value in best.data.items() if value != as_it_is.data[name]}
    tuned = config.model_copy(update={"data": config.data.model_copy(update=changed)})
    options.apply.write_text(tuned.to_yaml())
    print(f"{options.apply}: {best.name}")


def _parser() -> Parser:
    parser = Parser("python -m benchmarks.doctor", "Say what bounds a run, what would lift it, and try it.")
    parser.add_argument("--apply", type=Path, metavar="FILE", help="write the configuration with the best settings")
    cold = "drop the shards from the page cache before each turn (default: if they are larger than the memory)"
    parser.add_argument("--cold", action="store_true", help=cold)
    add_arguments(parser, rounds=5, seconds=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
