"""Every method trained by its demo recipe and evaluated against its untrained encoder.

    python -m benchmarks.methods --methods simclr byol --seeds 0 1 2

Recipes are `configs/demo-METHOD.yaml`: one encoder, its views, schedule and optimizer, but for MAE's encoder and views
and supervised's schedule. So the table says that a method trains, not which is best. Accuracies are of test images,
percent; chance is 10. Peak memory is the process's, on the host. Each finished run is a line of ``--out`` at once.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.report import show
from sharding.build import main as build_shards
from sharding.command import Parser, UserError, command
from train.engine.automatic import environment
from train.engine.monitor import read_metrics
from train.methods import METHODS

_HEALTH = ("embedding_std", "rankme", "alignment", "uniformity", "lidar", "alpha_req", "collapse")
_COLUMNS = ("knn", "linear", "embedding_std", "rankme", "images_per_second", "peak_memory_mib")


@command("benchmarks.methods")
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    for split in ("train", "test"):
        if not (options.data / split / "manifest.json").exists():
            build_shards(["--dataset", "demo", "--split", split, "--out", str(options.data / split)])
    rows: list[dict[str, Any]] = []
    try:
        for method, seed in product(options.methods, options.seeds):
            rows.append(measured(method, seed, options))
            with options.out.open("a") as file:
                file.write(json.dumps({**rows[-1], "environment": environment()}) + "\n")
    finally:  # also those before a run that failed
        show("accuracies: pretrained (untrained), percent", ["method", "seed", *_COLUMNS], map(_cells, rows))
    return 0


def measured(method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """A run in a process of its own, and what became of it. Raises UserError where it failed."""
    run = options.runs / f"{method}-{seed}"
    teacher = [f"method.weights={options.runs}/simclr-{seed}"] if method == "distill" else []
    settings = [f"data.shards={options.data}/train", f"run.dir={run}", f"run.seed={seed}", *teacher, *options.overrides]
    train = ["train.pretrain", "--config", f"configs/demo-{method}.yaml", *settings]
    memory = _run(train)
    _run(["train.evaluate", "--checkpoint", str(run), "--test", f"{options.data}/test", "--untrained"])
    evaluation = json.loads((run / "evaluation.jsonl").read_text().splitlines()[-1])
    records: list[dict[str, Any]] = list(read_metrics(run))
    return {
        "method": method,
        "seed": seed,
        "command": " ".join(train),
        "steps": evaluation["step"],
        "accuracy_percent": {encoder: top_1(results) for encoder, results in evaluation["results"].items()},
        "peak_memory_mib": memory,
        **{name: records[-1][name] for name in _HEALTH if name in records[-1]},
        "images_per_second": statistics.median(record["images_per_second"] for record in records),
    }


def top_1(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Percent, by protocol, from what `train.evaluate` found of an encoder."""
    return {p: v for p, values in results.items() for name, v in values.items() if name.endswith("top-1 %")}


def _run(arguments: Sequence[str]) -> float:
    """The peak of its memory, MiB."""
    process = subprocess.Popen([sys.executable, "-m", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"python -m {' '.join(arguments)}: failed with exit code {process.returncode}; see its lines")
    return usage.ru_maxrss / 1024


def _cells(row: dict[str, Any]) -> list[str]:
    before, after = row["accuracy_percent"]["untrained"], row["accuracy_percent"]["pretrained"]
    accuracies = [f"{after[name]:.1f} ({before[name]:.1f})" for name in ("knn", "linear")]
    return [row["method"], str(row["seed"]), *accuracies, *(f"{row[name]:.3g}" for name in _COLUMNS[2:])]


def _parser() -> Parser:
    parser = Parser("python -m benchmarks.methods", "Train and evaluate methods.")
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="train/ and test/; made where missing")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"), help="a run goes to NAME-SEED in it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/methods-demo.jsonl"))
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="for all runs, first on the line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
