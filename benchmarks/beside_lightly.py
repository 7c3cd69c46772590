"""Methods of ours beside lightly's: each trained from the same initial weights by `train.pretrain`, and by lightly's
transform, loss and a plain loop, then evaluated alike.

    python -m benchmarks.beside_lightly --methods simclr --seeds 0 1 2

Recipes are `configs/cifar10-narrow-METHOD.yaml`. Each finished run is a line of ``--out`` at once; started again, the
command leaves out what is there. The table has mean and standard deviation over seeds, and the 95 % interval of the
differences seed by seed. Images need not come in the same order, nor views be drawn alike.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import track

from benchmarks.measure import Rate
from benchmarks.methods import run_module, top_1
from benchmarks.report import show
from sharding.command import UserError, command
from train.engine.automatic import environment
from train.engine.monitor import read_lines

METHODS = ("simclr", "barlow", "vicreg", "lejepa")
SIDES = {"ours": "train.pretrain", "lightly": "benchmarks.peers.lightly"}
_PROTOCOLS = ("knn", "linear")


class Cell(NamedTuple):
    """One run of the comparison."""

    method: str
    seed: int
    side: str


@command("benchmarks.beside_lightly")
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    os.environ |= {"OMP_NUM_THREADS": "1"}  # of the runs, of which ``jobs`` go on at a time
    done = _rows(options.out)
    cells = [Cell(*names) for names in product(options.methods, options.seeds, SIDES)]
    missing = [cell for cell in cells if cell not in done]
    options.runs.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        started = [pool.submit(_measured, cell, options) for cell in missing]
        for finished in track(as_completed(started), "runs", total=len(started)):
            with options.out.open("a") as file:
                file.write(json.dumps({**finished.result(), "environment": environment()}) + "\n")
    rows = _rows(options.out)
    table = (_cells(method, protocol, options.seeds, rows) for method, protocol in product(options.methods, _PROTOCOLS))
    show("top-1, percent", ["method", *SIDES, "ours - lightly", "untrained"], table)
    return 0


def _measured(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """A run and its evaluation; what they print goes to a file beside the run's directory."""
    run, recipe = options.runs / "-".join(map(str, cell)), f"configs/cifar10-narrow-{cell.method}.yaml"
    settings = [f"data.shards={options.data}/train", f"run.dir={run}", f"run.seed={cell.seed}", "data.num_threads=1"]
    train = [SIDES[cell.side], "--config", recipe, *settings, *options.overrides]
    with run.with_suffix(".txt").open("a") as log:
        run_module(train, log)
        evaluate = ["train.evaluate", "--checkpoint", str(run), "--test", f"{options.data}/test", "--untrained"]
        run_module([*evaluate, "data.num_threads=1"], log)
    (*_, evaluation), _ = read_lines(run / "evaluation.jsonl", "results")
    accuracies = {encoder: top_1(results) for encoder, results in evaluation["results"].items()}
    row = {**cell._asdict(), "steps": evaluation["step"], "accuracy_percent": accuracies}
    return {**row, "command": f"python -m {' '.join(train)}", "data": evaluation["train"]["fingerprint"]}


def _rows(path: Path) -> dict[Cell, dict[str, Any]]:
    """The lines that there are, by cell. Raises UserError for a line that is none."""
    lines, problems = read_lines(path, "accuracy_percent")
    if problems:
        raise UserError(f"{problems[0]}; remove it")
    return {Cell(line["method"], line["seed"], line["side"]): line for line in lines}


def _cells(method: str, protocol: str, seeds: Sequence[int], rows: dict[Cell, dict[str, Any]]) -> list[str]:
    """Of the table: both sides with their standard deviations, and how far ours is above lightly's."""

    def found(side: str, encoder: str = "pretrained") -> Rate:
        return Rate(tuple(rows[Cell(method, s, side)]["accuracy_percent"][encoder][protocol] for s in seeds))

    sides = [found(side) for side in SIDES]
    spreads = [f" (sd {statistics.stdev(side.rounds):.1f})" if len(seeds) > 1 else "" for side in sides]
    difference = sides[0].by_round(lambda ours, theirs: ours - theirs, sides[1])
    cells = [f"{side.mean:.1f}{spread}" for side, spread in zip(sides, spreads, strict=True)]
    cells.append(f"{difference.mean:+.1f} ± {difference.margin:.1f}")
    return [f"{method}, {protocol}", *cells, f"{found('ours', 'untrained').mean:.1f}"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beside_lightly", description="Train beside lightly.")
    add = parser.add_argument
    add("--data", type=Path, default=Path("data/cifar10-narrow"), help="shards: train/ and test/")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME", help=f"of {', '.join(METHODS)}")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--jobs", type=int, default=2, help="runs at a time, a thread each (default: %(default)s)")
    add("--runs", type=Path, default=Path("runs/beside-lightly"), help="a run goes to METHOD-SEED-SIDE in it")
    add("--out", type=Path, default=Path("benchmarks/results/beside-lightly-cifar10.jsonl"))
    add("overrides", nargs="*", metavar="section.field=value", help="for all runs, first on the line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
