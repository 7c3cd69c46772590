"""From uint8 views to the tensors that a network takes."""

import torch

from pipeline.backends import Views
from pipeline.plan import BatchPlan


def to_batch(views: Views, plan: BatchPlan, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Views (n, H, W, 3) uint8 as (n, 3, H, W) channels_last on ``device``, normalised by their specs."""
    return [
        normalize(images.to(device, non_blocking=True), view.spec.mean, view.spec.std, dtype)
        for images, view in zip(views, plan.views, strict=True)
    ]


def normalize(
    images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype
) -> torch.Tensor:
    """``(images / 255 - mean) / std`` of (n, H, W, 3) uint8 as (n, 3, H, W), channels_last in memory."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device)
    return torch.addcmul(shift, images.to(torch.float32), scale).to(dtype).permute(0, 3, 1, 2)
