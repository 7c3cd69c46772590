"""Evaluate an encoder: ``python -m train.evaluate --checkpoint runs/x --protocol knn linear knn.k=200``."""

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from pipeline.views import ViewSpec
from sharding.command import Parser, UserError, command
from train.engine import automatic
from train.engine.checkpoint import Pretrained, load_pretrained
from train.evaluate import PROTOCOLS, Protocol, build_protocol
from train.evaluate.data import Images, choose_images, evaluation_view
from train.evaluate.features import FEATURES, Features, extract, weights_of
from train.evaluate.finetune import Trained
from train.evaluate.pictures import Album
from train.model.encoder import Encoder
from train.overrides import parse_override
from train.pretrain import reading
from train.processes import stop
from train.processes.distributed import session

RESULTS = "evaluation.jsonl"  # beside the checkpoint, a line for each evaluation
Protocols = dict[str, Protocol]
Pair = tuple[str, str | None]  # of shards to train on and shards to test on


class Evaluation(NamedTuple):
    """On images seen by ``view``. The record has all that the results depend on, and the results by encoder and
    protocol; ``h`` has the representations by encoder, of training and of testing."""

    record: dict[str, Any]
    train: Images
    test: Images
    view: ViewSpec
    h: dict[str, list[Features]]


@command("train.evaluate")
def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    protocols, overrides = choose_protocols([*options.protocol, *options.settings])
    with session("train.evaluate") as world:
        pretrained = load_pretrained(options.checkpoint, overrides)
        pairs = choose_pairs(options.train or [pretrained.config.data.shards], options.test or [None])
        sets = [_prepare(pair, protocols, pretrained, options.checkpoint) for pair in pairs]
        folder, how = options.features or pretrained.directory / FEATURES, reading(pretrained.config.data, world)
        encoders = _encoders(pretrained, options.untrained)
        for one, (name, encoder) in product(sets, encoders.items()):
            own, results = pretrained._replace(encoder=encoder), one.record["results"].setdefault(name, {})
            if not all(isinstance(protocol, Trained) for protocol in protocols.values()):
                one.h[name] = [extract(encoder, part, one.view, folder, world, **how) for part in (one.train, one.test)]
                for side, h in zip(("train", "test"), one.h[name], strict=True):
                    one.record[side]["num_images"] = len(h)  # without those that cannot be decoded
            for chosen, protocol in protocols.items():
                if not isinstance(protocol, Trained):
                    results[chosen] = protocol.together(own, one.test, one.h[name][1], world)
                elif (found := protocol.run(chosen, own, one.train, one.test, one.view, world)) is None:
                    return stop.EXIT_CODE
                else:
                    results[chosen] = found
    for one in sets if world.is_main else ():
        albums = [Album(pretrained.directory, name, one.record["step"], one.test.shards, how) for name in encoders]
        _finish(one, protocols, albums, world.device)
        with (pretrained.directory / RESULTS).open("a") as file:
            file.write(json.dumps(one.record) + "\n")
        _draw(one.record, pretrained.directory, several=len(sets) > 1)
        _show(one.record)
        for album in (album for album in albums if album.drawn):
            print(f"pictures are in {album.folder}")
    return 0


def choose_protocols(words: Sequence[str]) -> tuple[Protocols, list[str]]:
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


def choose_pairs(train: list[str], test: list[str | None]) -> list[Pair]:
    """Shards to train and to test on, those at the same place together; a single one goes with each of the others."""
    count = max(len(train), len(test))
    if {len(train), len(test)} - {1, count}:
        raise UserError(f"--train, --test: expected as many of each, or one, found {len(train)} and {len(test)}")
    return list(zip(train * (count // len(train)), test * (count // len(test)), strict=True))


def _prepare(pair: Pair, protocols: Protocols, pretrained: Pretrained, checkpoint: Path) -> Evaluation:
    train, test = choose_images(*pair, labelled=any(protocol.needs_labels for protocol in protocols.values()))
    for protocol in protocols.values():
        protocol.check(len(train.ids), len(test.ids))
    view = evaluation_view(pretrained.config.views, train.shards)
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": automatic.commit(),
        "checkpoint": str(checkpoint),
        "step": pretrained.step,
        "weights": weights_of(pretrained.encoder),
        "held_out": test.shards is train.shards,
        "train": train.describe(),
        "test": test.describe(),
        "view": view.model_dump(mode="json"),
        "settings": {name: protocol.model_dump(mode="json") for name, protocol in protocols.items()},
        "results": {},
    }
    return Evaluation(record, train, test, view, {})


def _encoders(pretrained: Pretrained, untrained: bool) -> dict[str, Encoder]:
    torch.manual_seed(pretrained.config.run.seed)  # as `train.pretrain` does
    others = {"untrained": Encoder(pretrained.config.encoder)} if untrained else {}
    return {"pretrained": pretrained.encoder, **others}


def _finish(one: Evaluation, protocols: Protocols, albums: list[Album], device: torch.device) -> None:
    """What rank 0 makes alone, after what all ranks made together."""
    for album, (chosen, protocol) in product(albums, protocols.items()):
        if not isinstance(protocol, Trained):
            train, test = one.h[album.encoder]
            values = dict(protocol(train, test, device)) | protocol.draw(test, album, device)
            one.record["results"][album.encoder][chosen] |= values


def _draw(record: dict[str, Any], directory: Path, several: bool) -> None:
    """The values for TensorBoard, beside the curves of the run; of ``several`` data sets with the test shards' name."""
    of = f" {record['test']['shards']}" if several else ""
    with SummaryWriter(str(directory / "tensorboard" / "evaluation")) as board:
        for encoder, protocol in product(record["results"], record["settings"]):
            for name, value in record["results"][encoder][protocol].items():
                board.add_scalar(f"{encoder}/{protocol}/{name.replace('%', 'percent')}{of}", value, record["step"] or 0)


def _show(record: dict[str, Any]) -> None:
    results, step = record["results"], record["step"]
    title = f"{record['train']['num_images']} train and {record['test']['num_images']} test images"
    table = Table("protocol", "", *results, title=title + ("" if step is None else f", step {step}"))
    for protocol, values in results["pretrained"].items():
        for name in values:
            table.add_row(protocol, name, *(f"{found[protocol][name]:.4g}" for found in results.values()))
    print(record["test"]["shards"])
    Console().print(table)


def _parser() -> Parser:
    parser = Parser(
        "python -m train.evaluate",
        "Evaluate a pretrained encoder, on one process or, by torchrun, on many.",
        "Settings: PROTOCOL.FIELD=VALUE (knn.k=[20,200], knn.preset=lightly), data.FIELD and views.FIELD in place of\n"
        "the run's, and for a file of other people encoder.name=...; docs/evaluation.md has the protocols.",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="a run's directory, a checkpoint, or a file of other people")
    add("--protocol", nargs="+", default=["knn", "linear"], help=f"of {', '.join(PROTOCOLS)} (default: knn linear)")
    more = "; again for more: the first --train goes with the first --test, or one with all"
    add("--train", action="append", help="shards of training images (default: those of the run)" + more)
    add("--test", action="append", help="shards of test images (default: every fifth training image)")
    add("--untrained", action="store_true", help="evaluate the encoder at its initial weights as well")
    add("--features", type=Path, help="folder for representations (default: `features` beside the checkpoints)")
    add("settings", nargs="*", metavar="name=value", help="see below")
    return parser


if __name__ == "__main__":
    sys.exit(main())
