"""How long a run is, and the learning rate and weight decay of each of its steps."""

import logging
import math
from dataclasses import dataclass

import numpy as np

from sharding.command import UserError
from sharding.manifest import Manifest, ShardSet
from train.config import Config
from train.methods import method_class
from train.optim import schedule
from train.optim.optimizers import OptimConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPlan:
    total_steps: int
    warmup_steps: int
    peak: float
    optim: OptimConfig

    def learning_rate(self, step: int) -> float:
        """Of the update ``step``, from 0, in the shape of ``optim.schedule``."""
        optim = self.optim
        if optim.schedule == "step" and step >= self.warmup_steps:
            return schedule.stairs(step / self.total_steps, self.peak, optim.milestones)
        final = self.peak * (optim.final_learning_rate if optim.schedule == "cosine" else 1)
        return schedule.warmup_cosine(
            step, total_steps=self.total_steps, warmup_steps=self.warmup_steps, peak=self.peak, final=final
        )

    def moving(self, name: str, step: int) -> float:
        """Weight decay or momentum: from ``optim.<name>`` by a cosine to ``optim.<name>_end``, where that is set."""
        start, end = getattr(self.optim, name), getattr(self.optim, f"{name}_end")
        return start if end is None else schedule.cosine(step / self.total_steps, start, end)

    def __str__(self) -> str:
        """What follows from the configuration and the data."""
        moves = f"; momentum {self._ends('momentum')}" if self.optim.momentum_end is not None else ""
        return (
            f"{self.total_steps} steps; learning rate {self.peak:.4g} after {self.warmup_steps} steps of warm-up, "
            f"{self.learning_rate(self.total_steps):.4g} at the end ({self.optim.schedule}); weight decay "
            f"{self._ends('weight_decay')}{moves}"
        )

    def _ends(self, name: str) -> str:
        first, last = self.moving(name, 0), self.moving(name, self.total_steps)
        return f"{first:g}" + (f" to {last:g}" if last != first else "")


def plan_run(config: Config, num_samples: int) -> RunPlan:
    """Epochs as steps of a pass over so many images."""
    batch, optim = config.run.global_batch_size, config.optim
    steps_per_epoch = num_samples / batch
    warmup_steps = round(optim.warmup_epochs * steps_per_epoch)
    peak = schedule.scaled_peak(optim.learning_rate, batch, optim.scaling)
    if optim.steps is not None:
        return RunPlan(optim.steps, min(warmup_steps, optim.steps // 10), peak, optim)
    return RunPlan(math.ceil(optim.epochs * steps_per_epoch), warmup_steps, peak, optim)


def check_batch(config: Config, manifest: Manifest, world_size: int) -> None:
    """Raises UserError unless lanes, processes and pieces divide the global batch; warns of one that is too large."""
    batch, piece = config.run.global_batch_size, config.run.micro_batch_size
    for count, what in ((manifest.num_lanes, "lanes of the shards"), (world_size, "processes")):
        if batch % count:
            raise UserError(f"run.global_batch_size: expected a multiple of the {count} {what}, found {batch}")
    if piece and batch // world_size % piece:
        raise UserError(
            f"run.micro_batch_size: expected a divisor of the {batch // world_size} images of a process, found {piece}"
        )
    if 2 * batch > manifest.num_samples:
        log.warning(
            "run.global_batch_size: %d is more than half of the %d images, so batches across a pass's end hold many "
            "images twice, each as its own negative; a smaller one or more data are better",
            batch,
            manifest.num_samples,
        )


def check_labels(config: Config, shards: ShardSet) -> None:
    """Raises UserError where the method takes labels, unless all images have one, of two classes or more, and of no
    more than it is to tell apart."""
    name, labels = config.method.name, shards.index.label
    if not method_class(name).takes_labels:
        return
    missing, classes = int((labels < 0).sum()), len(np.unique(labels[labels >= 0]))
    if missing or classes < 2:
        raise UserError(
            f"data.shards: {shards.directory}: expected labelled images of 2 classes or more for method.name={name}, "
            f"found {missing} of {len(labels)} without a label (a folder with a single class counts as unlabelled) and "
            f"{classes} classes; choose labelled shards, or a method that takes no labels"
        )
    most, least = getattr(config.method, "num_classes", math.inf), int(labels.max()) + 1
    if most < least:
        raise UserError(f"method.num_classes: expected {least} or more for {shards.directory}, found {most}; raise it")
