"""The gradient of an undivided batch from pieces that fit into memory.

Where a loss is a mean over images, pieces are trained on one by one and their gradients averaged. Where images meet in
it, `grad_cache` (Gao et al., "Scaling deep contrastive learning batch size under memory limited setup", 2021) makes all
embeddings without a graph, takes the loss's gradient with respect to them, and then passes it back through each piece,
made again with the same draws. Both are exact but for BatchNorm, whose statistics are those of a piece (over all
ranks), because there images meet in `Method.forward`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from train.methods import Loss, Method
from train.model.draws import Draws


class Piece(NamedTuple):
    views: list[torch.Tensor]  # V of (m, 3, H, W)
    draws: Draws
    labels: torch.Tensor | None

    def split(self, size: int) -> list["Piece"]:
        """Pieces of ``size`` images, which must divide their number."""
        rows = [slice(start, start + size) for start in range(0, len(self.views[0]), size)]
        labels = self.labels
        return [
            Piece([view[r] for view in self.views], self.draws.rows(r), None if labels is None else labels[r])
            for r in rows
        ]


Forward = Callable[[list[torch.Tensor], Draws], Any]  # the method's, in mixed precision, with graph
NoSync = Callable[[], AbstractContextManager[None]]  # within it, gradients are not averaged over ranks


def accumulate(method: Method, forward: Forward, no_sync: NoSync, pieces: list[Piece]) -> Loss:
    """Backward of the mean of the pieces' losses."""
    losses = []
    for piece in pieces:
        with nullcontext() if piece is pieces[-1] else no_sync():
            loss = method.loss(forward(piece.views, piece.draws), piece.labels)
            (loss.value / len(pieces)).backward()
        losses.append(loss)
    return _mean(losses)


def grad_cache(method: Method, forward: Forward, no_sync: NoSync, pieces: list[Piece]) -> Loss:
    """Backward of the loss of all pieces together, with the graph of one of them in memory at a time."""
    with torch.no_grad(), _statistics_kept(method):
        parts = [forward(piece.views, piece.draws) for piece in pieces]
    whole = [torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)]
    cached = type(parts[0])(*(tensor.requires_grad_(tensor.is_floating_point()) for tensor in whole))
    loss = method.loss(cached, _labels(pieces))
    loss.value.backward()
    rows = slice(0, 0)
    for piece in pieces:
        rows = slice(rows.stop, rows.stop + len(piece.draws.ids))
        with nullcontext() if piece is pieces[-1] else no_sync():
            _backward(forward(piece.views, piece.draws), cached, rows)
    return Loss(loss.value.detach(), loss.metrics)


def _backward(made: Any, cached: Any, rows: slice) -> None:
    """Through a piece, from the gradients of its ``rows`` of what was cached."""
    pairs = [(a, b.grad[:, rows]) for a, b in zip(made, cached, strict=True) if a.requires_grad and b.grad is not None]
    torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])


def _labels(pieces: list[Piece]) -> torch.Tensor | None:
    labels = [piece.labels for piece in pieces if piece.labels is not None]
    return torch.cat(labels) if labels else None


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """BatchNorm's running statistics are those before: the pieces will be made once more."""
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    buffers = [b for layer in layers for b in layer.buffers()]
    before = [b.clone() for b in buffers]
    yield
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)


def _mean(losses: list[Loss]) -> Loss:
    metrics = {name: torch.stack([loss.metrics[name] for loss in losses]).mean() for name in losses[0].metrics}
    return Loss(torch.stack([loss.value.detach() for loss in losses]).mean(), metrics)
