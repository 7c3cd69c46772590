"""Evaluate a pretrained encoder: ``python -m train.evaluate --checkpoint runs/x --protocol knn linear``."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
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
from train.config import Config, validate
from train.engine import automatic, checkpoint
from train.evaluate.features import Features, check_labels, extract
from train.evaluate.knn import accuracy, check_neighbours, knn_predict
from train.evaluate.linear import linear_predict
from train.model.encoder import Encoder

# name -> (predict, the options that it takes)
PROTOCOLS: dict[str, tuple[Callable[..., torch.Tensor], tuple[str, ...]]] = {
    "knn": (knn_predict, ("k", "temperature")),
    "linear": (linear_predict, ("weight_decay",)),
}
RESULTS = "evaluation.jsonl"  # in the run directory, a line for each evaluation
_HOLDOUT = 0.2


@dataclass(frozen=True)
class Images:
    """The images of one side of an evaluation: all of the shards, or ``ids``."""

    shards: ShardSet
    ids: Ints

    def describe(self) -> dict[str, Any]:
        where = {"shards": str(self.shards.directory), "fingerprint": self.shards.manifest.fingerprint}
        return {**where, "num_images": len(self.ids)}


@command("train.evaluate")
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if int(os.environ.get("RANK", "0")) == 0:  # under torchrun one process does all of it
        _show(evaluate(options))
    return 0


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Accuracies in percent by encoder ("pretrained", "untrained") and protocol, with all that they depend on; also
    appended to `RESULTS` beside the checkpoint. Raises `UserError` for what cannot be evaluated."""
    state = checkpoint.load_any(options.checkpoint)
    directory = options.checkpoint.parent if options.checkpoint.is_file() else options.checkpoint
    config = validate(state["config"], str(directory))
    train, test = choose_images(options.train or config.data.shards, options.test)
    if "knn" in options.protocol:
        check_neighbours(options.k, len(train.ids))
    view = evaluation_view(config.views, train.shards)
    encoders = {"pretrained": checkpoint.exported_encoder(state, str(directory))}
    if options.untrained:
        encoders["untrained"] = untrained_encoder(config)
    settings = {name: {o: getattr(options, o) for o in PROTOCOLS[name][1]} for name in options.protocol}
    results: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": str(options.checkpoint),
        "step": state["step"],
        "held_out": test.shards is train.shards,
        "train": train.describe(),
        "test": test.describe(),
        "view": view.model_dump(mode="json"),
        "settings": settings,
        "accuracy_percent": {
            name: _accuracies(name, encoder, train, test, view, settings) for name, encoder in encoders.items()
        },
    }
    with (directory / RESULTS).open("a") as file:
        file.write(json.dumps(results) + "\n")
    return results


def choose_images(train: str, test: str | None) -> tuple[Images, Images]:
    """Without test shards a part of the training images is held back.

    Raises `UserError` unless all have labels, of the same two classes or more, and no test image is a training image.
    """
    train_set = open_shards(train)
    test_set = open_shards(test) if test else train_set
    if test and test_set.manifest.fingerprint == train_set.manifest.fingerprint:
        raise UserError(
            f"--test {test}: expected other images than those of {train_set.directory}, found the same, "
            "so that every image would be its own nearest neighbour; leave --test out to hold a part of them back"
        )
    expected, found = train_set.manifest.class_names, test_set.manifest.class_names
    if found != expected:
        raise UserError(
            f"--test {test}: expected the {len(expected)} classes of {train_set.directory} ({_few(expected)}), found "
            f"{len(found)} classes ({_few(found)}); name the training images of the same data set with --train"
        )
    ids, all_ids = _split(train_set) if test_set is train_set else (_all(train_set), _all(test_set))
    chosen = Images(train_set, ids), Images(test_set, all_ids)
    for images in chosen:
        check_labels(images.shards.index.label[images.ids].astype(np.int64), str(images.shards.directory))
    num_classes = len(np.unique(train_set.index.label[ids]))
    if num_classes < 2:
        raise UserError(f"{train_set.directory}: expected training images of 2 classes or more, found {num_classes}")
    return chosen


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "none"


def _accuracies(
    name: str, encoder: Encoder, train: Images, test: Images, view: ViewSpec, settings: dict[str, dict[str, Any]]
) -> dict[str, float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder.to(device)
    known, asked = (
        _features(encoder, images, view, device, f"{name} encoder, {part} set")
        for images, part in ((train, "train"), (test, "test"))
    )
    if not (known.h.std(0) > 1e-6 * known.h.abs().max()).any():
        raise UserError(f"{name} encoder: all images have the same representation; the encoder has collapsed")
    return {
        protocol: accuracy(PROTOCOLS[protocol][0](known, asked, **options), asked.labels)
        for protocol, options in settings.items()
    }


def untrained_encoder(config: Config) -> Encoder:
    """The encoder as the run's seed initialised it."""
    torch.manual_seed(config.run.seed)
    return Encoder(config.encoder)


def evaluation_view(views: Sequence[ViewSpec], shards: ShardSet) -> ViewSpec:
    """The centre crop to evaluate with, of the largest view's size and interpolation.

    The image is resized to 8/7 of it first, as is usual on ImageNet, but small images (at least half of them no larger
    than the view) to the size itself, so that square ones are seen whole, as is usual on CIFAR.
    """
    largest = max(views, key=lambda view: view.size)
    size = largest.size
    small = np.median(np.minimum(shards.index.height, shards.index.width)) <= size
    resize = size if small else round(size * 256 / 224)
    how = {name: getattr(largest, name) for name in ("interpolation", "mean", "std")}
    (view,) = preset("eval", size=size, resize=resize, **how)
    return view


def _features(encoder: Encoder, images: Images, view: ViewSpec, device: torch.device, description: str) -> Features:
    return extract(
        encoder,
        images.shards,
        view,
        device=device,
        ids=images.ids,
        backend="auto",
        num_threads=automatic.num_threads(0),
        description=description,
    )


def _all(shards: ShardSet) -> Ints:
    return np.arange(shards.manifest.num_samples, dtype=np.int64)


def _split(shards: ShardSet) -> tuple[Ints, Ints]:
    """Without a test set: every fifth sample, which the sharder's shuffle made a uniform choice."""
    ids = _all(shards)
    held_out = ids % round(1 / _HOLDOUT) == 0
    return ids[~held_out], ids[held_out]


def _show(results: dict[str, Any]) -> None:
    accuracies = results["accuracy_percent"]
    protocols = list(accuracies["pretrained"])
    table = Table(
        "encoder",
        *protocols,
        title=f"accuracy in percent, {results['train']['num_images']} train and {results['test']['num_images']} test "
        f"images, step {results['step']}",
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
    parser.add_argument("--train", help="shards of labelled training images (default: those of the run)")
    parser.add_argument("--test", help="shards of test images (default: every fifth training image)")
    parser.add_argument("--untrained", action="store_true", help="evaluate the encoder at its initial weights as well")
    parser.add_argument("--k", type=int, default=20, help="neighbours of knn (default: 20; 200 is usual)")
    parser.add_argument("--temperature", type=_positive, default=0.07, help="of knn's votes (default: 0.07)")
    parser.add_argument("--weight-decay", type=_positive, default=1e-3, help="of the linear probe (default: 0.001)")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
