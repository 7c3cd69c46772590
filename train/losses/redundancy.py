"""Losses that make the dimensions of an embedding vary, each in a way of its own.

Their matrices (D, D) are large (256 MiB at 8192 dimensions), and each row of them is a dimension's own matter. So
``rows`` computes only some rows of a matrix and what they add to the loss: processes that hold the embeddings of the
whole batch share the rows out among themselves.
"""

import torch
import torch.nn.functional as F

ALL = slice(None)


def cross_correlation(a: torch.Tensor, b: torch.Tensor, rows: slice = ALL, eps: float = 1e-5) -> torch.Tensor:
    """The ``rows`` of the cross-correlation matrix (D, D) of two views (N, D) (Zbontar et al., 2021, equation 2).

    ``eps`` is added to variances, as the BatchNorm without parameters does that facebookresearch/barlowtwins takes.
    """
    return _standardized(a, eps)[:, rows].T @ _standardized(b, eps) / len(a)


def barlow_twins(a: torch.Tensor, b: torch.Tensor, off_diagonal: float, rows: slice = ALL) -> torch.Tensor:
    """The loss of Barlow Twins (equation 1): ``sum_i (1 - C_ii)^2 + off_diagonal * sum_i sum_(j != i) C_ij^2``.

    a, b    (N, D): embeddings of two views of the whole batch; i runs over ``rows`` of C, their `cross_correlation`
    """
    c = cross_correlation(a, b, rows)
    diagonal = _diagonal(c, rows)
    return (1 - diagonal).square().sum() + off_diagonal * (c.square().sum() - diagonal.square().sum())


def variance_hinge(z: torch.Tensor, eps: float = 1e-4) -> torch.Tensor:
    """``mean_j max(0, 1 - sqrt(Var(z_j) + eps))`` of z (N, D) (Bardes et al., 2022, equations 1 and 2), unbiased."""
    return F.relu(1 - (z.var(dim=0) + eps).sqrt()).mean()


def covariance(z: torch.Tensor, rows: slice = ALL) -> torch.Tensor:
    """``1/D sum_i sum_(j != i) Cov(z)_ij^2`` of z (N, D) (Bardes et al., 2022, equations 3 and 4), i over ``rows``."""
    centred = z - z.mean(0)
    c = centred[:, rows].T @ centred / (len(z) - 1)
    return (c.square().sum() - _diagonal(c, rows).square().sum()) / z.shape[1]


def _standardized(z: torch.Tensor, eps: float) -> torch.Tensor:
    return (z - z.mean(0)) * (z.var(dim=0, correction=0) + eps).rsqrt()


def _diagonal(c: torch.Tensor, rows: slice) -> torch.Tensor:
    """The elements C_ii of the ``rows`` of a matrix C, of which ``c`` holds those rows alone."""
    return c[:, rows].diagonal()
