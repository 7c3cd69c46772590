"""A queue: embeddings of the most recent images, kept from step to step."""

import torch
import torch.nn.functional as F
from torch import nn


class Queue(nn.Module):
    """The last ``size`` embeddings of length 1, ``rows`` (size, D), in a ring; random ones until it is full.

    Every rank pushes the same rows and so keeps the same queue. It is part of the state of a run.
    """

    rows: torch.Tensor
    position: torch.Tensor

    def __init__(self, size: int, num_features: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, num_features), dim=-1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, rows: torch.Tensor, accepted: torch.Tensor) -> None:
        """Puts ``rows`` (n, D), normalised, in the place of the oldest ones where ``accepted`` is 1, nothing where it
        is 0. Of more rows than the queue has, the last ones."""
        size = len(self.rows)
        rows = F.normalize(rows[-size:], dim=-1).to(self.rows.dtype)
        places = (self.position + torch.arange(len(rows), device=rows.device)) % size
        self.rows[places] = torch.where(accepted > 0, rows, self.rows[places])
        self.position.add_(len(rows) * accepted.long()).remainder_(size)
