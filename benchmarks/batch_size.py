"""What larger batches bring: steps and seconds to a target against the batch size (Shallue et al., "Measuring the
effects of data parallelism on neural network training", 2019).

    python -m benchmarks.batch_size --batches 32 64 128 256 512 --rates 1e-3 2e-3 4e-3 8e-3 --target 40

For each batch the configuration is trained with each of the learning rates, constant after the warm-up, for as many
images. The target is an online kNN accuracy, percent, over the last 2048 images by the 4096 before them, whatever the
batch. Of the rates the one with the fewest steps counts; where it is the first or the last, a wider grid may have done
better, and the table says so.

The prediction is ``steps = least (1 + noise / B)`` (McCandlish et al., 2018, equation 2.7). The noise scale is the
median of what a run of the middle batch, in two pieces, logs until the target; ``least`` is fitted. Finished runs are
kept.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import save, show
from sharding.command import Parser, UserError, command
from train.config import load_config
from train.engine.automatic import environment
from train.engine.monitor import read_metrics
from train.pretrain import pretrain
from train.processes.distributed import World

_WINDOW = 2048  # images


class Reached(NamedTuple):
    """The target, by a run."""

    steps: int
    seconds: float
    rate: float


@command("benchmarks.batch_size")
def main(arguments: Sequence[str] | None = None) -> int:
    options, start = _parser().parse_args(arguments), environment()
    best: dict[int, Reached] = {}
    for batch in sorted(options.batches):
        runs = [reached(_trained(batch, rate, options), batch, rate, options.target) for rate in sorted(options.rates)]
        if found := [run for run in runs if run]:
            best[batch] = min(found)
    if not best:
        raise UserError(f"--target {options.target}: no run has reached it; lower it, or raise --images")
    middle = sorted(best)[len(best) // 2]
    pieces = ["run.noise_scale=true", f"run.micro_batch_size={middle // 2}"]
    records = _trained(middle, best[middle].rate, options, "-noise", *pieces)[: best[middle].steps]
    scales = [record["critical_batch_size"] for record in records if "critical_batch_size" in record]
    if not scales:
        raise UserError(f"--target {options.target}: reached before there was a noise scale; raise it")
    noise = statistics.median(scales)
    least = _least({batch: run.steps for batch, run in best.items()}, noise)
    edges = {min(options.rates), max(options.rates)} if len(options.rates) > 1 else set()
    columns = ["batch", "steps", "predicted", "images", "seconds", "rate"]
    rows = []
    for batch, (steps, seconds, rate) in best.items():
        edge = " (the grid's edge)" if rate in edges else ""
        counts = [batch, steps, round(least * (1 + noise / batch)), batch * steps]
        rows.append([*map(str, counts), f"{seconds:.1f}", f"{rate:g}{edge}"])
    show(f"to {options.target:g} % online kNN; noise scale {noise:.0f}", columns, rows)
    save(options.out, start, [{"noise_scale": noise}, *({"batch": b, **r._asdict()} for b, r in best.items())])
    _draw(options.out.with_suffix(".png"), best, noise, least)
    return 0


def _trained(
    batch: int, rate: float, options: argparse.Namespace, suffix: str = "", *more: str
) -> list[dict[str, Any]]:
    """The records of a run, which is continued if it was stopped: one a step."""
    settings = ["optim.schedule=constant", "run.log_every=1", f"run.global_batch_size={batch}", *options.overrides]
    settings += [f"optim.learning_rate={rate * 256 / batch}", f"optim.steps={math.ceil(options.images / batch)}"]
    settings += ["optim.scaling=linear", f"run.dir={options.runs}/{batch}-{rate:g}{suffix}", *more]
    config = load_config(options.config, settings)
    pretrain(config, World())
    return read_metrics(config.run.dir)


def reached(records: Sequence[Mapping[str, Any]], batch: int, rate: float, target: float) -> Reached | None:
    """Where the mean over the last 2048 images is first the target or above; None where it never is."""
    count, seconds = max(1, _WINDOW // batch), 0.0
    for number, record in enumerate(records, 1):
        seconds += batch / record["images_per_second"]
        recent = [
            r["online_knn_percent"] for r in records[max(0, number - count) : number] if "online_knn_percent" in r
        ]
        if len(recent) == count and statistics.fmean(recent) >= target:
            return Reached(record["step"], seconds, rate)
    return None


def _least(steps: Mapping[int, int], noise: float) -> float:
    """Steps of an infinite batch, by least squares of logarithms."""
    return math.exp(statistics.fmean(math.log(count / (1 + noise / batch)) for batch, count in steps.items()))


def _draw(path: Path, best: Mapping[int, Reached], noise: float, least: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.loglog(list(best), [run.steps for run in best.values()], "o", label="measured")
    axes.loglog(list(best), [least * (1 + noise / b) for b in best], label=f"predicted, noise scale {noise:.0f}")
    axes.set(xlabel="images a batch", ylabel="steps to the target", xticks=list(best), xticklabels=map(str, best))
    axes.xaxis.set_minor_formatter("")
    axes.legend()
    figure.savefig(path, dpi=120)
    print(f"chart: {path}")


def _parser() -> Parser:
    parser = Parser("python -m benchmarks.batch_size", "Steps to a target by batch.")
    add = parser.add_argument
    add(
        "--config",
        type=Path,
        default=Path("configs/demo-simclr.yaml"),
        help="YAML file of a run (default: %(default)s)",
    )
    add("--batches", nargs="+", type=int, default=[32, 64, 128, 256, 512])
    add("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3, 8e-3], help="of an update, for every batch")
    add("--target", type=float, default=40.0, help="percent of online kNN (default: %(default)s)")
    add("--images", type=int, default=60000, help="that each run is trained on (default: %(default)s)")
    add("--runs", type=Path, default=Path("runs/batch-size"), help="a run goes to BATCH-RATE in it")
    add("--out", type=Path, default=Path("benchmarks/results/batch-size-demo.jsonl"), help="and a chart beside it")
    add("overrides", nargs="*", metavar="section.field=value", help="for all runs, first on the line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
