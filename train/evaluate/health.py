"""The health of the test images' representations, without labels: see `train.engine.health` for how to read it."""

from typing import ClassVar

import torch

from train.engine.health import alpha_req, rankme
from train.evaluate import Protocol, Values
from train.evaluate.features import Features


class Health(Protocol):
    needs_labels: ClassVar[bool] = False

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
