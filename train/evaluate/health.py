"""The health of the test images' representations, without labels: see `train.engine.health` for how to read it."""

from itertools import cycle, islice, pairwise
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field

from train.engine.checkpoint import Pretrained
from train.engine.health import alignment, alpha_req, lidar, rankme
from train.evaluate import Protocol, Values
from train.evaluate.data import Images
from train.evaluate.features import Features, represent
from train.losses.contrastive import uniformity
from train.pretrain import reading
from train.processes.distributed import World


class Health(Protocol):
    needs_labels: ClassVar[bool] = False

    images: int = Field(1000, ge=2, le=10_000, description="test images with augmented views, evenly chosen")
    views: int = Field(10, ge=2, description="augmented views of each: the run's largest, its groups in turn")

    def together(self, pretrained: Pretrained, images: Images, test: Features, world: World) -> dict[str, float]:
        chosen = test.ids.numpy()[np.linspace(0, len(test) - 1, min(self.images, len(test))).astype(np.int64)]
        run, size = pretrained.config, max(view.size for view in pretrained.config.views)
        groups = [view.model_copy(update={"count": 1}) for view in run.views if view.size == size]
        views, how = list(islice(cycle(groups), self.views)), reading(run.data, world)
        found = represent(pretrained.encoder, Images(images.shards, chosen), views, world, how)
        if not (of_ranks := world.collect([h for _, h in found])):
            return {}
        z = torch.cat([h for of_rank in of_ranks for h in of_rank], dim=1).to(world.device).double()
        return {
            "LiDAR": lidar(z).item(),
            "alignment": float(np.mean([alignment(torch.stack(pair)).item() for pair in pairwise(z)])),
            "uniformity": float(np.mean([uniformity(view[None]).item() for view in z])),
        }

    def __call__(self, train: Features, test: Features, device: torch.device) -> Values:
        gram = torch.zeros((), dtype=torch.float64, device=device)
        for h, _ in test.tiles(device):
            extended = torch.cat([h, h.new_ones(len(h), 1)], dim=1).double()  # the last row sums
            gram = gram + extended.T @ extended
        gram, mean = gram[:-1, :-1], gram[-1, :-1] / len(test)
        spectrum = torch.linalg.eigvalsh(gram / len(test) - torch.outer(mean, mean)).clamp_min(0)
        yield "dimensions", len(spectrum)
        yield "RankMe", rankme(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()).item()
        yield "alpha-ReQ", alpha_req(spectrum).item()
        yield "variance of the first direction %", 100 * (spectrum[-1] / spectrum.sum()).item()
