"""Methods of self-supervised learning, one file each, and what they have in common."""

from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from pipeline.settings import Settings
from train.model.draws import Draws
from train.model.encoder import Encoder, EncoderConfig
from train.processes.distributed import World

# name -> "module:class", imported when chosen
METHODS = {
    "simclr": "train.methods.simclr:SimCLR",
    "mocov2": "train.methods.mocov2:MoCoV2",
    "mocov3": "train.methods.mocov3:MoCoV3",
    "nnclr": "train.methods.nnclr:NNCLR",
    "byol": "train.methods.byol:BYOL",
    "simsiam": "train.methods.simsiam:SimSiam",
    "barlow": "train.methods.barlow:BarlowTwins",
    "vicreg": "train.methods.vicreg:VICReg",
    "ssl-hsic": "train.methods.ssl_hsic:SSLHSIC",
    "lejepa": "train.methods.lejepa:LeJEPA",
    "visreg": "train.methods.visreg:VISReg",
    "swav": "train.methods.swav:SwAV",
    "dino": "train.methods.dino:DINO",
    "mae": "train.methods.mae:MAE",
    "distill": "train.methods.distill:Distill",
    "supervised": "train.methods.supervised:Supervised",
    "supcon": "train.methods.supcon:SupCon",
}


class MethodConfig(Settings):
    """The section ``method`` of a configuration; each method has its own, in which ``name`` is a literal."""

    min_views: ClassVar[int] = 2  # of each image
    min_global: ClassVar[int] = 0  # views that come first and must be of the largest size

    name: str = ""


class Recipe:
    """How the paper trains a method: defaults of a configuration that chooses the method and says nothing else.

    ``views`` is a preset of `pipeline.views`; ``sections`` are fields of the other sections, as YAML would have them.
    """

    def __init__(self, views: str, **sections: dict[str, Any]) -> None:
        self.views, self.sections = views, sections


class Loss(NamedTuple):
    """``value``: this rank's loss, the mean over its own images, a scalar. ``metrics``: detached scalars to log, which
    are averaged over ranks. The train step adds what `train.engine.health` and `train.engine.online` look at."""

    value: torch.Tensor
    metrics: dict[str, torch.Tensor]
    z: torch.Tensor | None = None  # (at most 2, b, at most 512): E's first tensor, of some views and dimensions
    h: torch.Tensor | None = None  # (b, F): representations of the first view


class Update(NamedTuple):
    """An update that was made, or refused because of its gradient."""

    progress: float  # the fraction of the run that is finished after it, in (0, 1]
    accepted: torch.Tensor  # 1.0, or 0.0 where it was refused: on the device, since the host does not wait to know
    e: Any  # E of this rank's images, all pieces of the batch together, without gradient


class Method(nn.Module):
    """An encoder and what it is trained with, in two parts: `forward`, in which images stay apart (but for BatchNorm),
    and `loss`, in which they meet. So embeddings can be made piece by piece.

    ``E``, what `forward` returns, is a NamedTuple of the method's own, of tensors (V, b, ...): a row an image. The
    first one is watched for collapse; ``h`` (V, b, F) are the encoder's representations. All trainable parameters are
    used in `forward`; state that is not trained is in buffers, which every rank keeps equal.
    """

    Config: ClassVar[type[MethodConfig]]
    recipe: ClassVar[Recipe]
    images_meet: ClassVar[bool] = True  # in `loss`: False where it is a mean over images, so that pieces just add up
    takes_labels: ClassVar[bool] = False
    length_counts: ClassVar[bool] = False  # whether the loss sees the length of embeddings, so that it is watched

    encoder: Encoder

    def forward(self, views: list[torch.Tensor], draws: Draws) -> Any:
        """V views (b, 3, H, W) of b images -> E. Draws from ``draws`` alone."""
        raise NotImplementedError

    def loss(self, e: Any, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        """The loss of E; ``labels`` (b,) int64 for methods that take them, ``draws`` of these images for those that
        draw in it. Gathers with gradient what it needs."""
        raise NotImplementedError

    def teachers(self) -> list[tuple[nn.Module, nn.Module]]:
        """Pairs of a teacher and the network that it follows."""
        return []

    def after_update(self, update: Update) -> None:
        """Moves what is not trained: a teacher, a queue. Must change nothing where ``update.accepted`` is 0."""

    def pretrained(self) -> list[tuple[Encoder, Path | None]]:
        """Encoders that a run is to give weights to, and the run or file that these are in."""
        return []

    def exported(self) -> Encoder:
        """The encoder that evaluation and export take."""
        return self.encoder


def method_class(name: str) -> type[Method]:
    """The class of a method of the table."""
    chosen: type[Method] = resolve_name(METHODS[name])
    return chosen


def build_method(config: MethodConfig, encoder: EncoderConfig, world: World) -> Method:
    """The method on its freshly initialised encoder; the caller seeds torch's generator."""
    method = method_class(config.name)(config, Encoder(encoder), world)
    if encoder.drop_path:
        method.register_forward_pre_hook(_drop_paths)
    return method


def _drop_paths(method: nn.Module, arguments: Any) -> None:
    """Before `Method.forward`: tells the encoder, but no teacher, the draws of its images."""
    assert isinstance(method, Method)
    method.encoder.draw_from(arguments[1])


def same_size(views: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Runs of consecutive views of equal shape."""
    groups: list[list[torch.Tensor]] = []
    for view in views:
        if groups and groups[-1][0].shape == view.shape:
            groups[-1].append(view)
        else:
            groups.append([view])
    return groups


def encode(encoder: nn.Module, views: list[torch.Tensor]) -> torch.Tensor:
    """Representations (V, b, F) of V views (b, 3, H, W); views of one size pass the encoder together."""
    return torch.cat([encoder(torch.cat(group)).unflatten(0, (len(group), -1)) for group in same_size(views)])
