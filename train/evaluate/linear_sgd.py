"""DINOv3's linear classifiers (facebookresearch/dinov3, eval/linear.py) on stored representations: SGD at a grid of
learning rates, all at once, of which the best on a held-out fifth of the training set is trained again on all of it.
Theirs sees random crops and flips, and reports the best of the grid on the test set."""

import torch
import torch.nn.functional as F
from pydantic import Field

from train.evaluate import Protocol, Rates, Values
from train.evaluate.features import Features
from train.evaluate.linear import accuracies, logits
from train.optim.schedule import warmup_cosine

_GRID = tuple(factor * 10**-power for power in (5, 4, 3, 2) for factor in (1, 2, 5))  # times batch / 256


class LinearSGD(Protocol):
    learning_rate: Rates = Field((*_GRID, 0.1), description="of a batch of 256, to choose from")
    epochs: int = Field(10, ge=1, description="passes over the training set")
    batch_size: int = Field(1024, ge=1, description="images of a step")
    momentum: float = Field(0.9, ge=0, lt=1)
    seed: int = Field(0, ge=0, description="of the order")

    def __call__(self, train: Features, test: Features, device: torch.device) -> Values:
        held_out = torch.arange(len(train)) % 5 == 0
        scores = accuracies(self._trained(train.take(~held_out), self.learning_rate, device), train.take(held_out))
        best = self.learning_rate[int(scores.argmax())]
        yield "learning rate chosen", best
        yield "top-1 %", accuracies(self._trained(train, (best,), device), test).item()

    def _trained(self, train: Features, rates: Rates, device: torch.device) -> torch.Tensor:
        """Weights (R, C, D + 1), by rate. The loss is the sum of the classifiers' own, each times its rate: without
        decay, a step of rate 1 down that is for each of them a step of its own rate."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = len(rates), int(train.labels.max()) + 1, train.h.shape[1] + 1
        weights = (0.01 * torch.randn(shape[1:], generator=generator)).expand(shape).clone().to(device)
        weights[..., -1] = 0
        optimizer = torch.optim.SGD([weights.requires_grad_()], lr=0.0, momentum=self.momentum)
        scale = torch.tensor(rates, device=device) * self.batch_size / 256
        orders = [torch.randperm(len(train), generator=generator) for _ in range(self.epochs)]
        batches = [batch for order in orders for batch in order.split(self.batch_size)]
        for step, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = warmup_cosine(step, total_steps=len(batches), warmup_steps=0, peak=1.0)
            ((h, labels),) = train.take(batch).tiles(device, self.batch_size)
            losses = torch.stack([F.cross_entropy(logits(h, w), labels) for w in weights])
            optimizer.zero_grad()
            (scale * losses).sum().backward()
            optimizer.step()
        return weights.detach()
