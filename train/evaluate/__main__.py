"""Evaluate a pretrained encoder: ``python -m train.evaluate --checkpoint runs/x --protocol knn linear``."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from pipeline.plan import Ints
from pipeline.views import ViewSpec, preset
from sharding.command import UserError, command
from sharding.manifest import ShardSet, open_shards
from train import checkpoint
from train.config import Config, validate
from train.encoder import Encoder
from train.evaluate.features import Features, extract
from train.evaluate.knn import accuracy, knn_predict
from train.evaluate.linear import linear_predict
from train.pretrain import cores_per_process

PROTOCOLS: dict[str, Callable[[Features, Features, argparse.Namespace], torch.Tensor]] = {
    "knn": lambda train, test, options: knn_predict(train, test, k=min(options.k, len(train))),
    "linear": lambda train, test, options: linear_predict(train, test, weight_decay=options.weight_decay),
}
_HOLDOUT = 0.2


@command("train.evaluate")
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    results = evaluate(options)
    _show(results)
    return 0


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Accuracies in percent by encoder ("pretrained", "untrained") and protocol; also written beside the checkpoint."""
    path = find_checkpoint(options.checkpoint)
    state = checkpoint.load(path)
    config = validate(state["config"], str(path))
    train_set = open_shards(options.train or config.data.shards)
    test_set = open_shards(options.test) if options.test else train_set
    if test_set is not train_set and test_set.manifest.fingerprint == train_set.manifest.fingerprint:
        raise UserError(
            f"--test {options.test}: expected other images than those of {train_set.directory}, found the same, "
            "each of which would find itself; leave --test out to hold a part of them back"
        )
    train_ids, test_ids = _split(train_set) if test_set is train_set else (None, None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoders = {"pretrained": pretrained_encoder(config, state)}
    if options.untrained:
        encoders["untrained"] = untrained_encoder(config)
    results: dict[str, Any] = {"checkpoint": str(path), "step": state["step"], "accuracy_percent": {}}
    for name, encoder in encoders.items():
        encoder.to(device)
        train, test = (
            _features(encoder, shards, ids, config, device, f"{name} encoder, {part} set")
            for shards, ids, part in ((train_set, train_ids, "train"), (test_set, test_ids, "test"))
        )
        results["num_train"], results["num_test"] = len(train), len(test)
        results["accuracy_percent"][name] = {
            protocol: accuracy(PROTOCOLS[protocol](train, test, options), test.labels) for protocol in options.protocol
        }
    (path.parent / f"evaluation-{path.stem}.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def find_checkpoint(path: Path) -> Path:
    """The file itself, or the newest checkpoint of a run directory."""
    if path.is_file():
        return path
    found = checkpoint.checkpoints(path)
    if not found:
        raise FileNotFoundError(f"--checkpoint {path}: expected a checkpoint or a run directory with step-*.pt files")
    return found[-1]


def pretrained_encoder(config: Config, state: dict[str, Any]) -> Encoder:
    encoder = Encoder(config.encoder)
    prefix = "encoder."
    weights = {k.removeprefix(prefix): v for k, v in state["method"].items() if k.startswith(prefix)}
    encoder.load_state_dict(weights)
    return encoder


def untrained_encoder(config: Config) -> Encoder:
    """The encoder as the run's seed initialised it."""
    torch.manual_seed(config.run.seed)
    return Encoder(config.encoder)


def evaluation_view(views: Sequence[ViewSpec]) -> ViewSpec:
    """The centre crop to evaluate with: of the largest view's size, from an image resized to 8/7 of it."""
    largest = max(views, key=lambda view: view.size)
    size = largest.size
    (view,) = preset("eval", size=size, resize=round(size * 256 / 224), mean=largest.mean, std=largest.std)
    return view


def _features(
    encoder: Encoder, shards: ShardSet, ids: Ints | None, config: Config, device: torch.device, description: str
) -> Features:
    return extract(
        encoder,
        shards,
        evaluation_view(config.views),
        device=device,
        ids=ids,
        backend="auto",
        num_threads=cores_per_process(),
        description=description,
    )


def _split(shards: ShardSet) -> tuple[Ints, Ints]:
    """Without a test set: every fifth sample, which the sharder's shuffle made a uniform choice."""
    ids = np.arange(shards.manifest.num_samples, dtype=np.int64)
    held_out = ids % round(1 / _HOLDOUT) == 0
    return ids[~held_out], ids[held_out]


def _show(results: dict[str, Any]) -> None:
    accuracies = results["accuracy_percent"]
    protocols = list(accuracies["pretrained"])
    table = Table(
        "encoder",
        *protocols,
        title=f"accuracy in percent, {results['num_train']} train and {results['num_test']} test images",
    )
    for name, row in accuracies.items():
        table.add_row(name, *(f"{row[protocol]:.1f}" for protocol in protocols))
    Console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate", description="Evaluate a pretrained, frozen encoder."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint, or a run directory (its newest)")
    parser.add_argument("--protocol", nargs="+", choices=list(PROTOCOLS), default=list(PROTOCOLS))
    parser.add_argument("--train", type=Path, help="shards of labelled training images (default: those of the run)")
    parser.add_argument("--test", type=Path, help="shards of test images (default: every fifth training image)")
    parser.add_argument("--untrained", action="store_true", help="evaluate the encoder at its initial weights as well")
    parser.add_argument("--k", type=int, default=20, help="neighbours of knn (default: 20; 200 is usual on ImageNet)")
    parser.add_argument("--weight-decay", type=float, default=1e-3, help="of the linear probe (default: 0.001)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
