"""The linear probe: multinomial logistic regression on frozen, standardised representations, by full-batch L-BFGS:
convex, so deterministic and without a learning rate to tune."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from pydantic import Field

from sharding.progress import steps
from train.evaluate import Protocol, Rates, Values
from train.evaluate.features import Features


class Linear(Protocol):
    weight_decay: Rates = Field((1e-4, 1e-3, 1e-2, 1e-1), description="to choose from on a fifth of the training set")
    iterations: int = Field(200, ge=1, description="of L-BFGS, at most")

    def __call__(self, train: Features, test: Features, device: torch.device) -> Values:
        mean, std = train.moments()
        train, test = (replace(features, mean=mean, std=std.clamp_min(1e-6)) for features in (train, test))
        chosen = self.weight_decay[0]
        if len(self.weight_decay) > 1:
            held_out = torch.arange(len(train)) % 5 == 0
            rest, part = train.take(~held_out), train.take(held_out)
            tried = steps(self.weight_decay, "weight decays")
            scores = [accuracy(fit(rest, decay, self.iterations, device), part, device) for decay in tried]
            chosen = self.weight_decay[scores.index(max(scores))]
            yield "weight decay chosen", chosen
        yield "top-1 %", accuracy(fit(train, chosen, self.iterations, device), test, device)


def fit(train: Features, weight_decay: float, iterations: int, device: torch.device) -> torch.nn.Linear:
    """The layer, from zeros, that minimises mean cross entropy + ``weight_decay`` / 2 * |W|^2 (without the biases)."""
    layer = torch.nn.Linear(train.h.shape[1], int(train.labels.max()) + 1, device=device)
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    solver = torch.optim.LBFGS(layer.parameters(), max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        solver.zero_grad()
        value = weight_decay / 2 * layer.weight.square().sum()
        value.backward()
        for x, labels in train.tiles(device):
            part = F.cross_entropy(layer(x), labels, reduction="sum") / len(train)
            part.backward()
            value = value + part
        return value.detach()

    solver.step(objective)
    return layer


@torch.inference_mode()
def accuracy(layer: torch.nn.Linear, test: Features, device: torch.device) -> float:
    """Percent of the images whose class has the largest logit."""
    correct = [layer(x).argmax(1) == labels for x, labels in test.tiles(device)]
    return 100 * torch.cat(correct).double().mean().item()
