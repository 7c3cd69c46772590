"""Protocols that train through the loop: all weights, or a linear classifier on a frozen encoder.

Both see random resized crops and flips. They are runs of `train.methods.supervised`, on all processes, in a folder of
their own beside the checkpoint: one that is stopped or killed continues. The accuracy is that of the last epoch.
"""

import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
import xxhash
from pydantic import Field, model_validator
from rich.progress import track

from pipeline.loader import Loader
from pipeline.order import Sequential, ShuffledPart
from pipeline.views import ViewSpec
from sharding.command import UserError
from train.config import Config, validate
from train.engine.checkpoint import Pretrained
from train.engine.plan import plan_run
from train.evaluate import Protocol
from train.evaluate.data import Images, augmented_view, choose_fraction
from train.evaluate.features import hash_of
from train.methods.supervised import Supervised
from train.model.encoder import Encoder
from train.optim.optimizers import OptimConfig, build_optimizer
from train.pretrain import Beginning, build, reading, train
from train.processes.distributed import World

_BATCH = 256  # test images of a process that pass the network at a time
_SGD = {"name": "sgd", "weight_decay": 0.0, "warmup_epochs": 0}


class Trained(OptimConfig, Protocol):
    """A protocol that trains; with the settings of an optimizer, by default those of the first preset."""

    presets: ClassVar[dict[str, dict[str, Any]]]
    frozen: ClassVar[bool]  # whether the encoder stays as it is

    preset: str = Field("", description="a published protocol; what is set beside it is different")
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

    def run(
        self, name: str, pretrained: Pretrained, train_images: Images, test: Images, view: ViewSpec, world: World
    ) -> dict[str, float] | None:
        """Train in a folder of the ``name``, and test on images seen by ``view``: accuracies by name, the same on all
        ranks; None where it was stopped.

        The folder is named by all that decides its weights as well, so that different settings are a different run.
        """
        images = choose_fraction(train_images, self.fraction, self.seed)
        if self.batch_size > len(images.ids):
            raise UserError(
                f"{name}.batch_size: expected at most the {len(images.ids)} training images, found {self.batch_size}"
            )
        augmented = augmented_view(pretrained.config.views)
        digest = xxhash.xxh3_64(hash_of(pretrained.encoder, images.shards, augmented).encode() + images.ids.tobytes())
        digest.update(self.model_dump_json(exclude={"checkpoint_every"}).encode())
        folder = pretrained.directory / f"{name}-{digest.hexdigest()}"
        config = self._config(pretrained.config, images, augmented, folder)
        plan, order = plan_run(config, len(images.ids)), ShuffledPart(images.ids, self.seed, self.batch_size)
        begin = partial(self._begin, config, pretrained.encoder, world)
        method, done = train(config, images.shards, plan, world, begin, order)
        if done < plan.total_steps:
            return None
        return {"training images": len(images.ids)} | accuracies(cast(Supervised, method), test, view, config, world)

    def _config(self, run: Config, images: Images, view: ViewSpec, folder: Path) -> Config:
        """As of a run of ``train.pretrain``, of which precision, encoder and reading are the pretrained run's."""
        tree = run.model_dump(mode="json", include={"data", "encoder"})
        tree["data"]["shards"] = str(images.shards.directory)
        tree["views"] = [view.model_dump(mode="json")]
        tree["method"] = {"name": "supervised", "num_classes": len(images.shards.manifest.class_names)}
        tree["optim"] = self.model_dump(mode="json", include=set(OptimConfig.model_fields))
        tree["run"] = {
            "dir": str(folder),
            "seed": self.seed,
            "global_batch_size": self.batch_size,
            "precision": run.run.precision,
            "batchnorm": "local" if self.frozen else "global",
            "checkpoint_every": self.checkpoint_every,
            "online": False,
        }
        return validate(tree, "evaluation")

    def _begin(self, config: Config, encoder: Encoder, world: World) -> Beginning:
        method = build(config, world)
        method.encoder.load_state_dict(encoder.state_dict())
        if self.frozen:
            method.encoder.requires_grad_(False).eval()  # BatchNorm's averages stay as well
        scales = layer_scales(method.encoder, self.layer_decay)
        return method, build_optimizer(config.optim, method, scales=scales)


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
    }


class Finetune(Trained):
    """All weights, from those of the encoder, by cross entropy on a fraction of the labels."""

    frozen = False
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # lightly-ai/lightly, benchmarks/imagenet/resnet50/finetune_eval.py
        "lightly": {"learning_rate": 0.05, "batch_size": 256, "epochs": 30},
        # SimCLR, appendix B.5
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
def accuracies(method: Supervised, images: Images, view: ViewSpec, config: Config, world: World) -> dict[str, float]:
    """Percent of the images whose class is the likeliest, and among the five likeliest. Each rank sees its share."""
    method.eval()
    dtype = torch.float64 if config.run.precision == "fp64" else torch.float32
    order = Sequential(np.array_split(images.ids, world.size)[world.rank], _BATCH)
    counts = torch.zeros(3, dtype=torch.int64, device=world.device)
    with Loader(images.shards, (view,), seed=0, order=order, dtype=dtype, **reading(config.data, world)) as loader:
        for batch in track(loader, "test", total=order.num_steps, transient=True, disable=not world.is_main):
            scores = method.classifier(method.encoder(batch.views[0]))
            right = scores.topk(min(5, scores.shape[1])).indices == batch.labels[:, None]
            counts += torch.stack([right[:, 0].sum(), right.any(1).sum(), torch.tensor(len(right)).to(counts)])
    first, among, total = torch.tensor(world.gather_objects(counts.tolist())).sum(0).tolist()
    top_5 = {"top-5 %": 100 * among / total} if method.classifier.out_features > 5 else {}
    return {"top-1 %": 100 * first / total, **top_5}
