"""Evaluate an encoder: ``python -m train.evaluate --checkpoint runs/x --protocol knn linear knn.k=200``."""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from pipeline.views import ViewSpec
from sharding.command import UserError, command
from train.engine import automatic
from train.engine.checkpoint import Pretrained, load_pretrained
from train.evaluate import PROTOCOLS, Protocol, build_protocol
from train.evaluate.data import Images, choose_images, evaluation_view
from train.evaluate.features import FEATURES, Features, extract
from train.evaluate.finetune import Trained
from train.evaluate.pictures import Album
from train.model.encoder import Encoder
from train.overrides import parse_override
from train.pretrain import reading
from train.processes import stop
from train.processes.distributed import session

RESULTS = "evaluation.jsonl"  # beside the checkpoint, a line for each evaluation


@command("train.evaluate")
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    protocols, overrides = choose_protocols([*options.protocol, *options.settings])
    with session("train.evaluate") as world:
        pretrained = load_pretrained(options.checkpoint, overrides)
        record, images, view = _prepare(options, protocols, pretrained)
        folder, how = options.features or pretrained.directory / FEATURES, reading(pretrained.config.data, world)
        encoders, made = _encoders(pretrained, options.untrained), {}
        features: dict[str, Any] = {}
        for name, encoder in encoders.items():
            own = pretrained._replace(encoder=encoder)
            if not all(isinstance(protocol, Trained) for protocol in protocols.values()):
                features[name] = tuple(extract(encoder, part, view, folder, world, **how) for part in images)
            for chosen, protocol in protocols.items():
                if not isinstance(protocol, Trained):
                    made[name, chosen] = protocol.together(own, images[1], features[name][1], world)
                elif (found := protocol.run(chosen, own, *images, view, world)) is None:
                    return stop.EXIT_CODE
                else:
                    made[name, chosen] = found
    if world.is_main:
        results = record["results"] = {name: {} for name in encoders}
        albums = {name: Album(pretrained.directory, name, pretrained.step, images[1].shards, how) for name in encoders}
        for name, (chosen, protocol) in product(encoders, protocols.items()):
            results[name][chosen] = made[name, chosen]
            if not isinstance(protocol, Trained):
                results[name][chosen] |= _found(protocol, features[name], albums[name], world.device)
        with (pretrained.directory / RESULTS).open("a") as file:
            file.write(json.dumps(record) + "\n")
        _draw(record, pretrained.directory)
        _show(record)
        for album in (album for album in albums.values() if album.folder.exists()):
            print(f"pictures are in {album.folder}")
    return 0


def choose_protocols(words: Sequence[str]) -> tuple[dict[str, Protocol], list[str]]:
    """The protocols that are named, with those settings that are theirs, and all other settings."""
    settings: dict[str, dict[str, Any]] = {word: {} for word in words if "=" not in word}
    others = []
    for word in words:
        protocol, _, field = word.partition("=")[0].partition(".")
        if "=" in word and protocol in PROTOCOLS:
            if protocol not in settings:
                raise UserError(f"{word}: {protocol} is not among the protocols {', '.join(settings)}; name it as well")
            settings[protocol][field] = parse_override(word)[1]
        elif "=" in word:
            others.append(word)
    return {name: build_protocol(name, given) for name, given in settings.items()}, others


def _prepare(
    options: argparse.Namespace, protocols: dict[str, Protocol], pretrained: Pretrained
) -> tuple[dict[str, Any], tuple[Images, Images], ViewSpec]:
    """What the results will depend on: all of it, images of training and of testing, and how they are seen."""
    config, labelled = pretrained.config, any(protocol.needs_labels for protocol in protocols.values())
    train, test = choose_images(options.train or config.data.shards, options.test, labelled=labelled)
    for protocol in protocols.values():
        protocol.check(len(train.ids), len(test.ids))
    view = evaluation_view(config.views, train.shards)
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": automatic.commit(),
        "checkpoint": str(options.checkpoint),
        "step": pretrained.step,
        "held_out": test.shards is train.shards,
        "train": train.describe(),
        "test": test.describe(),
        "view": view.model_dump(mode="json"),
        "settings": {name: protocol.model_dump(mode="json") for name, protocol in protocols.items()},
    }
    return record, (train, test), view


def _encoders(pretrained: Pretrained, untrained: bool) -> dict[str, Encoder]:
    if not untrained:
        return {"pretrained": pretrained.encoder}
    torch.manual_seed(pretrained.config.run.seed)  # as `train.pretrain` does
    return {"pretrained": pretrained.encoder, "untrained": Encoder(pretrained.config.encoder)}


def _found(
    protocol: Protocol, features: tuple[Features, Features], album: Album, device: torch.device
) -> dict[str, float]:
    return dict(protocol(*features, device)) | protocol.draw(features[1], album, device)


def _draw(record: dict[str, Any], directory: Path) -> None:
    """The values for TensorBoard, beside the curves of the run."""
    with SummaryWriter(str(directory / "tensorboard" / "evaluation")) as board:
        for encoder, protocol in product(record["results"], record["settings"]):
            for name, value in record["results"][encoder][protocol].items():
                board.add_scalar(f"{encoder}/{protocol}/{name.replace('%', 'percent')}", value, record["step"] or 0)


def _show(record: dict[str, Any]) -> None:
    results, step = record["results"], record["step"]
    title = f"{record['train']['num_images']} train and {record['test']['num_images']} test images"
    table = Table("protocol", "", *results, title=title + ("" if step is None else f", step {step}"))
    for protocol, values in results["pretrained"].items():
        for name in values:
            table.add_row(protocol, name, *(f"{found[protocol][name]:.4g}" for found in results.values()))
    Console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description="Evaluate a pretrained encoder, on one process or, by torchrun, on many.",
        epilog="Settings: PROTOCOL.FIELD=VALUE (knn.k=[20,200], knn.preset=lightly), data.FIELD and views.FIELD "
        "in place of the run's, and for a file of other people encoder.name=...; docs/evaluation.md has the protocols.",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a run's directory, a checkpoint, or a file of other people")
    add("--protocol", nargs="+", default=["knn", "linear"], help=f"of {', '.join(PROTOCOLS)} (default: knn linear)")
    add("--train", help="shards of training images (default: those of the run)")
    add("--test", help="shards of test images (default: every fifth training image)")
    add("--untrained", action="store_true", help="evaluate the encoder at its initial weights as well")
    add("--features", type=Path, help="folder for representations (default: `features` beside the checkpoints)")
    add("settings", nargs="*", metavar="name=value", help="see below")
    return parser


if __name__ == "__main__":
    sys.exit(main())
