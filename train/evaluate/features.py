"""Representations of a data set under a frozen encoder, in sample order."""

from dataclasses import dataclass

import numpy as np
import torch
from rich.progress import track
from torch import nn

from pipeline.loader import Loader
from pipeline.order import Sequential
from pipeline.plan import Ints
from pipeline.views import ViewSpec
from sharding.command import UserError
from sharding.manifest import ShardSet


@dataclass(frozen=True)
class Features:
    """``h`` (n, D) float32 representations and ``labels`` (n,) int64, on one device.

    Raises `UserError` unless there is an image, every one has a label, and every representation is finite.
    """

    h: torch.Tensor
    labels: torch.Tensor

    def __post_init__(self) -> None:
        check_labels(self.labels.cpu().numpy(), "representations")
        broken = int((~self.h.isfinite().all(1)).sum())
        if broken:
            raise UserError(
                f"representations: {broken} of {len(self)} are NaN or infinite, and so are weights or statistics of "
                "the encoder; evaluate an earlier checkpoint"
            )

    def __len__(self) -> int:
        return len(self.labels)


def check_labels(labels: Ints, where: str) -> None:
    """Raises `UserError` unless there are images and every one has a label."""
    if not len(labels) or labels.min() < 0:
        raise UserError(
            f"{where}: expected labelled images, found {(labels < 0).sum()} of {len(labels)} without a label (a folder "
            "with a single class counts as unlabelled); name labelled shards with --train and --test"
        )


def extract(
    encoder: nn.Module,
    shards: ShardSet,
    spec: ViewSpec,
    *,
    device: torch.device,
    ids: Ints | None = None,
    batch_size: int = 256,
    backend: str = "cpu",
    num_threads: int = 2,
    description: str = "features",
) -> Features:
    """Representations of one view per sample (all, or ``ids``), the encoder in evaluation mode.

    Samples that cannot be decoded are left out, counted and named in the log; more than 100 are a `UserError`.
    """
    ids = np.arange(shards.manifest.num_samples, dtype=np.int64) if ids is None else ids
    order = Sequential(ids, batch_size)
    was_training = encoder.training
    encoder.eval()
    with (
        Loader(
            shards, (spec,), seed=0, order=order, backend=backend, num_threads=num_threads, prefetch=2, device=device
        ) as loader,
        torch.inference_mode(),
    ):
        batches = track(loader, description, total=order.num_steps, transient=True)
        parts = [(encoder(batch.views[0]).float(), batch.labels) for batch in batches]
    encoder.train(was_training)
    h, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Features(h, labels)
