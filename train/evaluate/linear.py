"""The linear probe: multinomial logistic regression on frozen, standardised representations, by full-batch L-BFGS:
convex, so deterministic and without a learning rate to tune."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from pydantic import Field

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
            part = train.take(~held_out)
            solutions = torch.cat([fit(part, decay, self.iterations, device) for decay in self.weight_decay])
            chosen = self.weight_decay[int(accuracies(solutions, train.take(held_out)).argmax())]
            yield "weight decay chosen", chosen
        yield "top-1 %", accuracies(fit(train, chosen, self.iterations, device), test).item()


def fit(train: Features, weight_decay: float, iterations: int, device: torch.device) -> torch.Tensor:
    """Weights (1, C, D + 1), the last column the biases, that minimise mean cross entropy + ``weight_decay`` / 2 *
    |W|^2 (without the biases)."""
    num_classes, num_features = int(train.labels.max()) + 1, train.h.shape[1]
    weights = torch.zeros(1, num_classes, num_features + 1, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        value = weight_decay / 2 * weights[..., :-1].square().sum()
        value.backward()
        for x, labels in train.tiles(device):
            part = F.cross_entropy(logits(x, weights[0]), labels, reduction="sum") / len(train)
            part.backward()
            value = value + part
        return value.detach()

    optimizer.step(objective)
    return weights.detach()


def logits(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(m, C), of representations (m, D) and weights (C, D + 1)."""
    return F.linear(x, weights[:, :-1], weights[:, -1])


def accuracies(weights: torch.Tensor, test: Features) -> torch.Tensor:
    """Percent (R,) of images whose class has the largest logit, by each of the classifiers (R, C, D + 1)."""
    tiles = test.tiles(weights.device)
    correct = [torch.stack([logits(x, w).argmax(1) == labels for w in weights]) for x, labels in tiles]
    return 100 * torch.cat(correct, dim=1).double().mean(1)
