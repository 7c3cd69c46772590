"""The gradient of an undivided batch from pieces that fit into memory.

Where a loss is a mean over images, pieces are trained on one by one and their gradients averaged. Where images meet in
it, `grad_cache` (Gao et al., "Scaling deep contrastive learning batch size under memory limited setup", 2021) makes all
embeddings without a graph, takes the loss's gradient with respect to them, and then passes it back through each piece,
made again with the same draws. Both are exact but for BatchNorm, whose statistics are those of a piece (over all
ranks), because there images meet in `Method.forward`.
"""

from collections.abc import Callable, Iterable, Iterator
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
Scale = Callable[[torch.Tensor], torch.Tensor]  # of the loss, and so of all gradients: that of fp16


def accumulate(
    method: Method, forward: Forward, no_sync: NoSync, batch: Piece, size: int, scale: Scale = lambda loss: loss
) -> tuple[Loss, Any]:
    """Backward of the mean of the losses of pieces of ``size`` images. Returns it, and E of all without gradient."""
    pieces, losses, parts = batch.split(size), [], []
    for piece in pieces:
        with nullcontext() if piece is pieces[-1] else no_sync():
            e = forward(piece.views, piece.draws)
            loss = method.loss(e, piece.labels, piece.draws)
            scale(loss.value / len(pieces)).backward()
        losses.append(loss)
        parts.append(type(e)(*(tensor.detach() for tensor in e)))
    return _mean(losses), _joined(parts)


def grad_cache(
    method: Method, forward: Forward, no_sync: NoSync, batch: Piece, size: int, scale: Scale = lambda loss: loss
) -> tuple[Loss, Any]:
    """Backward of the loss of all pieces together, with the graph of one of them in memory at a time. Returns what
    `accumulate` does."""
    pieces = batch.split(size)
    norms = [m for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    statistics = [buffer for norm in norms for buffer in norm.buffers()]
    with torch.no_grad(), kept(statistics):  # the pieces will be made once more
        whole = _joined([forward(piece.views, piece.draws) for piece in pieces])
    cached = type(whole)(*(tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in whole))
    loss = method.loss(cached, batch.labels, batch.draws)
    scale(loss.value).backward()
    rows = slice(0, 0)
    for piece in pieces:
        rows = slice(rows.stop, rows.stop + len(piece.draws.ids))
        with nullcontext() if piece is pieces[-1] else no_sync():
            _backward(forward(piece.views, piece.draws), cached, rows)
    return Loss(loss.value.detach(), loss.metrics), whole


def _backward(made: Any, cached: Any, rows: slice) -> None:
    """Through a piece, from the gradients of its ``rows`` of what was cached."""
    pairs = [(a, b.grad[:, rows]) for a, b in zip(made, cached, strict=True) if a.requires_grad and b.grad is not None]
    torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])


def _joined(parts: list[Any]) -> Any:
    """E of a batch from those of its pieces."""
    if len(parts) == 1:
        return parts[0]
    return type(parts[0])(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))


@contextmanager
def kept(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Their values are afterwards those before."""
    before = [(tensor, tensor.clone()) for tensor in tensors]
    yield
    for tensor, value in before:
        tensor.copy_(value)


def _mean(losses: list[Loss]) -> Loss:
    metrics = {name: torch.stack([loss.metrics[name] for loss in losses]).mean() for name in losses[0].metrics}
    return Loss(torch.stack([loss.value.detach() for loss in losses]).mean(), metrics)
