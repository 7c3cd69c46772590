"""Representations of a data set under a frozen encoder, in sample order."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from rich.progress import track
from torch import nn

from pipeline.backends import Backend, BackendOptions, UndecodableError, build_backend
from pipeline.loader import plan_samples
from pipeline.plan import BatchPlan, Ints
from pipeline.reader import Reader
from pipeline.transfer import to_batch
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

    Raises `UserError`, naming the samples, where some cannot be decoded.
    """
    ids = np.arange(shards.manifest.num_samples, dtype=np.int64) if ids is None else ids
    reader = Reader(shards)
    built = build_backend(backend, BackendOptions(reader, (spec,), batch_size, num_threads, 2, device))
    was_training = encoder.training
    encoder.eval()
    try:
        batches = _batches(built, shards, spec, ids, batch_size, device)
        num_batches = -(-len(ids) // batch_size)
        with torch.inference_mode():
            h = [encoder(images).float() for images in track(batches, description, total=num_batches, transient=True)]
    except UndecodableError as error:
        raise UserError(f"{shards.directory}: {error}; build the shards again without these images") from error
    finally:
        built.close()
        reader.close()
        encoder.train(was_training)
    labels = torch.from_numpy(shards.index.label[ids].astype(np.int64)).to(device)
    return Features(torch.cat(h), labels)


def _batches(
    backend: Backend, shards: ShardSet, spec: ViewSpec, ids: Ints, batch_size: int, device: torch.device
) -> Iterator[torch.Tensor]:
    starts = range(0, len(ids), batch_size)
    plans = [_plan(shards, spec, ids[start : start + batch_size]) for start in starts]
    pending = deque((plan, backend.submit(plan)) for plan in plans[:2])
    for following in [*plans[2:], None, None]:
        if not pending:
            return
        plan, views = pending.popleft()
        yield to_batch(views.result(), plan, device, torch.float32)[0]
        if following:
            pending.append((following, backend.submit(following)))


def _plan(shards: ShardSet, spec: ViewSpec, ids: Ints) -> BatchPlan:
    return plan_samples(shards, (spec,), seed=0, step=0, ids=ids, epochs=np.zeros_like(ids))
