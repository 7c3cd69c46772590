"""Losses that compare what is predicted of an image's pixels or features with what is there."""

import torch
import torch.nn.functional as F


def patches(images: torch.Tensor, size: int) -> torch.Tensor:
    """(n, 3, H, W) -> (n, N, 3 size^2): the squares of an image by rows, in each the channels of a pixel together."""
    n, channels, height, width = images.shape
    squares = images.reshape(n, channels, height // size, size, width // size, size)
    return squares.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, size * size * channels)


def standardised(squares: torch.Tensor) -> torch.Tensor:
    """Each patch (..., P) less its mean and divided by its standard deviation (He et al., MAE, 2022, section 3)."""
    variance, mean = torch.var_mean(squares, dim=-1, keepdim=True)
    return (squares - mean) / (variance + 1e-6).sqrt()


def masked_error(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean squared error of what was masked, (..., M, P) of M patches: MAE's loss, a scalar."""
    return (predictions - targets).square().mean()


def similarity_distillation(
    z: torch.Tensor, t: torch.Tensor, queue: torch.Tensor, temperature: float, teacher_temperature: float
) -> torch.Tensor:
    """SEED's loss (Fang et al., 2021, equation 5): the cross entropy of the softmax of z's cosines with ``t`` itself
    and a ``queue`` (K, D) of length 1, against that of t's, for z and t (n, D); the mean over n, a scalar."""
    z, t = F.normalize(z, dim=-1), F.normalize(t, dim=-1)
    cosines, targets = (torch.cat([(x * t).sum(-1, keepdim=True), x @ queue.T], dim=1) for x in (z, t))
    return F.cross_entropy(cosines / temperature, (targets / teacher_temperature).softmax(1))
