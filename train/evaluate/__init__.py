"""Evaluation of encoders: ``python -m train.evaluate``. Protocols, one file each, and what they have in common."""

from collections.abc import Iterator
from pkgutil import resolve_name
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator, Field, ValidationError

from pipeline.settings import Settings, problem
from sharding.command import UserError
from train.engine.checkpoint import Pretrained
from train.evaluate.data import Images
from train.evaluate.features import Features
from train.evaluate.pictures import Album
from train.processes.distributed import World

# name -> "module:class", imported when chosen
PROTOCOLS = {
    "knn": "train.evaluate.knn:KNN",
    "linear": "train.evaluate.linear:Linear",
    "linear-augmented": "train.evaluate.finetune:LinearAugmented",
    "finetune": "train.evaluate.finetune:Finetune",
    "retrieve": "train.evaluate.knn:Retrieve",
    "cluster": "train.evaluate.cluster:Cluster",
    "health": "train.evaluate.health:Health",
    "project": "train.evaluate.project:Project",
}

Values = Iterator[tuple[str, float]]

one_too = BeforeValidator(lambda value: value if isinstance(value, (list, tuple)) else (value,))
Rates = Annotated[tuple[Annotated[float, Field(gt=0)], ...], one_too, Field(min_length=1)]
Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], one_too, Field(min_length=1)]


class Protocol(Settings):
    """The settings of a protocol, and what it makes of the representations of training and test images."""

    needs_labels: ClassVar[bool] = True

    def check(self, num_train: int, num_test: int) -> None:
        """Raises `UserError` where there are too few images, before anything is made of them."""

    def together(self, pretrained: Pretrained, images: Images, test: Features, world: World) -> dict[str, float]:
        """Values that all ranks make together, of the test images; rank 0's count. Deterministic."""
        return {}

    def __call__(self, train: Features, test: Features, device: torch.device) -> Values:
        """Pairs (name, value) that rank 0 makes alone; the name says the unit. Deterministic."""
        yield from ()

    def draw(self, test: Features, album: Album, device: torch.device) -> dict[str, float]:
        """Leaves pictures in the album, if it has any, and returns values that say something of them."""
        return {}


def build_protocol(name: str, settings: dict[str, Any]) -> Protocol:
    """The protocol of the table with its settings. Raises `UserError`, which names the setting that is wrong."""
    if name not in PROTOCOLS:
        raise UserError(f"--protocol: expected some of {', '.join(PROTOCOLS)}, found {name!r}")
    kind: type[Protocol] = resolve_name(PROTOCOLS[name])
    try:
        return kind(**settings)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, (name, *e['loc'])))}: {problem(e)}" for e in error.errors()]
        raise UserError(f"{'; '.join(lines)} (settings of {name}: {', '.join(kind.model_fields)})") from None
