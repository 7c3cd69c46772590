"""Protocols that train through the loop: all weights, or a linear classifier on a frozen encoder.

Both see random resized crops and flips. They are runs of `train.methods.supervised`, on all processes, in a folder of
their own beside the checkpoint: one that is stopped or killed continues. The accuracy is that of the last epoch.
"""

import re
from copy import deepcopy
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from pydantic import Field, PlainSerializer, model_validator
from torch import nn

from pipeline.loader import Loader
from pipeline.order import Sequential, ShuffledPart
from pipeline.views import ViewSpec
from sharding.command import UserError
from sharding.progress import steps
from train.config import Config, validate
from train.engine.checkpoint import Pretrained
from train.engine.plan import plan_run
from train.evaluate import Protocol, Rates
from train.evaluate.data import Images, augmented_view, choose_fraction
from train.evaluate.features import hash_of
from train.methods import Loss, Method, encode
from train.methods.supervised import Logits, Supervised
from train.model.draws import Draws
from train.model.encoder import Encoder
from train.optim.optimizers import OptimConfig, build_optimizer
from train.pretrain import Beginning, build, reading, train
from train.processes.distributed import World

_BATCH = 256  # test images of a process that pass the network at a time
# facebookresearch/dinov3, dinov3/eval/linear.py
_DINOV3_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
_SGD = {"name": "sgd", "weight_decay": 0.0, "warmup_epochs": 0}


class Trained(OptimConfig, Protocol):
    """A protocol that trains; with the settings of an optimizer, by default those of the first preset."""

    presets: ClassVar[dict[str, dict[str, Any]]]
    frozen: ClassVar[bool]  # whether the encoder stays as it is

    preset: str = Field("", description="a published protocol; what is set beside it is different")
    learning_rate: Annotated[Rates, PlainSerializer(lambda rates: rates if len(rates) > 1 else rates[0])] = Field(  # type: ignore[assignment]
        (0.1,), description="as that of a run; of several one is chosen on a fifth of the training set"
    )
    fraction: float = Field(1.0, gt=0, le=1, description="of the training images of each class")
    batch_size: int = Field(256, ge=2, description="images of a step, over all processes")
    layer_decay: float = Field(1.0, gt=0, le=1, description="learning rate of a block: share of the next one's")
    seed: int = Field(0, ge=0, lt=2**64, description="of the fraction, the classifier, the order and the views")
    checkpoint_every: int = Field(1000, ge=1, description="steps between checkpoints")

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, given: dict[str, Any]) -> dict[str, Any]:
        chosen = given.get("preset") or next(iter(cls.presets))
        if chosen not in cls.presets:
            raise ValueError(f"preset: expected one of {', '.join(cls.presets)}, found {chosen!r}")
        return {**_SGD, **cls.presets[chosen], **given, "preset": chosen}

    @model_validator(mode="after")
    def _apart(self) -> "Trained":
        if len(self.learning_rate) > 1 and (self.clip_norm or not self.frozen):
            raise ValueError("learning_rate: expected one number; several need a frozen encoder, and no clip_norm")
        return self

    def run(
        self, name: str, pretrained: Pretrained, train_images: Images, test: Images, view: ViewSpec, world: World
    ) -> dict[str, float] | None:
        """Train in folders of the ``name``, and test on images seen by ``view``: accuracies by name, the same on all
        ranks; None where it was stopped. Of several learning rates, classifiers of all are trained at once without
        every fifth image, which choose one; what follows is the run of that rate alone."""
        images = choose_fraction(train_images, self.fraction, self.seed)
        if len(self.learning_rate) == 1:
            found = self._trained(name, pretrained, images, test, view, world)
            return {"training images": len(images.ids), **found[0]} if found else None
        held_out = np.arange(len(images.ids)) % 5 == 0
        rest, part = (Images(images.shards, images.ids[which]) for which in (~held_out, held_out))
        if not (found := self._trained(name, pretrained, rest, part, view, world)):
            return None
        scores = {rate: values["top-1 %"] for rate, values in zip(self.learning_rate, found, strict=True)}
        chosen = max(scores, key=scores.__getitem__)
        alone = self.model_copy(update={"learning_rate": (chosen,)})
        told = {f"held-out top-1 % at {rate:g}": score for rate, score in scores.items()}
        final = alone.run(name, pretrained, train_images, test, view, world)
        return {**told, "learning rate chosen": chosen, **final} if final else None

    def _trained(
        self, name: str, pretrained: Pretrained, images: Images, test: Images, view: ViewSpec, world: World
    ) -> list[dict[str, float]]:
        """Accuracies of the classifier of each learning rate; none where it was stopped.

        The folder is named by all that decides its weights as well, so that different settings are a different run.
        """
        if self.batch_size > (most := len(images.ids)):
            raise UserError(f"{name}.batch_size: expected at most the {most} training images, found {self.batch_size}")
        augmented = augmented_view(pretrained.config.views)
        digest = xxhash.xxh3_64(hash_of(pretrained.encoder, images.shards, augmented).encode() + images.ids.tobytes())
        digest.update(self.model_dump_json(exclude={"checkpoint_every"}).encode())
        folder = pretrained.directory / f"{name}-{digest.hexdigest()}"
        config = self._config(pretrained.config, images, augmented, folder)
        plan, order = plan_run(config, most), ShuffledPart(images.ids, self.seed, self.batch_size)
        begin = partial(self._begin, config, pretrained.encoder, world)
        method, done = train(config, images.shards, plan, world, begin, order)
        return accuracies(method, test, view, config, world) if done >= plan.total_steps else []

    def _config(self, run: Config, images: Images, view: ViewSpec, folder: Path) -> Config:
        """As of a run of ``train.pretrain``, of which precision, encoder and reading are the pretrained run's."""
        tree = run.model_dump(mode="json", include={"data", "encoder"})
        tree["data"]["shards"] = str(images.shards.directory)
        tree["views"] = [view.model_dump(mode="json")]
        tree["method"] = {"name": "supervised", "num_classes": len(images.shards.manifest.class_names)}
        tree["optim"] = self.model_dump(mode="json", include=set(OptimConfig.model_fields))
        tree["optim"]["learning_rate"] = self.learning_rate[0]
        tree["run"] = self.model_dump(include={"seed", "checkpoint_every"}) | {"dir": str(folder), "online": False}
        over = "local" if self.frozen else "global"
        tree["run"] |= {"global_batch_size": self.batch_size, "precision": run.run.precision, "batchnorm": over}
        return validate(tree, "evaluation")

    def _begin(self, config: Config, encoder: Encoder, world: World, anew: bool) -> Beginning:
        method: Any = build(config, world, anew)
        method.encoder.load_state_dict(encoder.state_dict())
        if self.frozen:
            method.encoder.requires_grad_(False).eval()  # BatchNorm's averages stay as well
        scales = layer_scales(method.encoder, self.layer_decay)
        if len(rates := self.learning_rate) > 1:
            method, shares = Grid(method, len(rates)), enumerate(rate / rates[0] for rate in rates)
            scales = {f"classifiers.{i}.{name}": share for i, share in shares for name in ("weight", "bias")}
        return method, build_optimizer(config.optim, method, scales=scales)


class Grid(Method):
    """Copies of a classifier on one frozen encoder, each to be trained at a rate of its own, as if it were alone."""

    images_meet = False
    takes_labels = True

    def __init__(self, alone: Supervised, count: int) -> None:
        super().__init__()
        self.encoder = alone.encoder
        self.classifiers = nn.ModuleList(deepcopy(alone.classifier) for _ in range(count))

    def forward(self, views: list[torch.Tensor], draws: Draws) -> Logits:
        """Of one view; logits are (1, b, R num_classes), of one classifier after the other."""
        h = encode(self.encoder, views)
        return Logits(torch.cat([classifier(h) for classifier in self.classifiers], dim=2), h)

    def loss(self, e: Logits, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        """The sum of the classifiers' losses, so that each has the gradient that it has alone."""
        assert labels is not None
        losses = [F.cross_entropy(logits, labels) for logits in e.logits[0].chunk(len(self.classifiers), 1)]
        return Loss(torch.stack(losses).sum(), {})


class LinearAugmented(Trained):
    """The linear protocol of the papers: a classifier on the frozen encoder."""

    frozen = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # lightly-ai/lightly, benchmarks/imagenet/resnet50/linear_eval.py
        "lightly": {"learning_rate": 0.1, "batch_size": 256, "epochs": 90},
        # Chen et al., "A simple framework for contrastive learning of visual representations", 2020, appendix B.6
        "simclr": {"learning_rate": 0.1, "batch_size": 4096, "epochs": 90, "nesterov": True},
        # facebookresearch/moco, main_lincls.py
        "moco": {"learning_rate": 30.0, "batch_size": 256, "epochs": 100, "schedule": "step", "milestones": (0.6, 0.8)},
        "dinov3": {"learning_rate": _DINOV3_RATES, "batch_size": 1024, "epochs": 10},  # 128 images of each of 8 GPUs
    }


class Finetune(Trained):
    """All weights, from those of the encoder, by cross entropy on a fraction of the labels."""

    frozen = False
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # lightly-ai/lightly, benchmarks/imagenet/resnet50/finetune_eval.py
        "lightly": {"learning_rate": 0.05, "batch_size": 256, "epochs": 30},
        # SimCLR, appendix B.5, in which a batch has 4096 images: more than a small data set has at 1 %
        "simclr-1%": {"learning_rate": 0.05, "batch_size": 256, "epochs": 60, "nesterov": True, "fraction": 0.01},
        "simclr-10%": {"learning_rate": 0.05, "batch_size": 256, "epochs": 30, "nesterov": True, "fraction": 0.1},
    }


_BLOCK = re.compile(r"(?:blocks|stages|layers)\.\d+\.|layer\d+\.")  # of timm's networks, and a ResNet's stages


def layer_scales(encoder: Encoder, decay: float) -> dict[str, float]:
    """Shares of the learning rate by parameter of a method with this encoder: ``decay`` to the power of the number of
    blocks up to the classifier, whose own share is 1 (Bao et al., "BEiT", 2022; MAE's code). What comes before the
    first block counts as a block; of a ResNet the stages are the blocks. Raises `UserError` where there are none."""
    names = [name for name, _ in encoder.backbone.named_parameters()]
    blocks = [found[0] if (found := _BLOCK.match(name)) else "" for name in names]
    top = len(set(blocks) - {""}) + 1
    if decay < 1 and top == 1:
        raise UserError("finetune.layer_decay: expected an encoder of blocks or stages, found none; leave it out")
    depths = np.cumsum([0, *(now != before for before, now in pairwise(blocks))])
    return {f"encoder.backbone.{name}": decay ** int(top - depth) for name, depth in zip(names, depths, strict=True)}


@torch.inference_mode()
def accuracies(method: Method, images: Images, view: ViewSpec, config: Config, world: World) -> list[dict[str, float]]:
    """Of each classifier: percent of the images whose class is the likeliest, and among the five likeliest. Each rank
    sees its share of the images."""
    method.eval()
    classifiers: Any = method.classifiers if isinstance(method, Grid) else [method.classifier]
    dtype = torch.float64 if config.run.precision == "fp64" else torch.float32
    order = Sequential(np.array_split(images.ids, world.size)[world.rank], _BATCH)
    counts = torch.zeros(len(classifiers), 3, dtype=torch.int64, device=world.device)
    with Loader(images.shards, (view,), seed=0, order=order, dtype=dtype, **reading(config.data, world)) as loader:
        for batch in steps(loader, "test", order.num_steps, shown=world.is_main):
            h = method.encoder(batch.views[0])
            scores = torch.stack([classifier(h) for classifier in classifiers])
            right = scores.topk(min(5, scores.shape[2])).indices == batch.labels[:, None]
            counts += torch.stack([right[..., 0], right.any(2), torch.ones_like(right[..., 0])], dim=2).sum(1)
    names = ("top-1 %", "top-5 %") if classifiers[0].out_features > 5 else ("top-1 %",)
    sums = torch.tensor(world.gather_objects(counts.tolist())).sum(0).tolist()
    return [{name: 100 * count / row[2] for name, count in zip(names, row, strict=False)} for row in sums]
