"""The linear probe: multinomial logistic regression on frozen, standardised representations."""

import torch
import torch.nn.functional as F

from train.evaluate.features import Features


def linear_predict(
    train: Features, test: Features, *, weight_decay: float = 1e-3, iterations: int = 200
) -> torch.Tensor:
    """Predicted labels (n,) of the test representations.

    Minimises mean cross entropy + ``weight_decay`` / 2 * |W|^2 by full-batch L-BFGS: convex, so deterministic and
    without a learning rate to tune.
    """
    mean, std = train.h.mean(0), train.h.std(0).clamp_min(1e-6)
    x, queries = (train.h - mean) / std, (test.h - mean) / std
    num_classes = int(train.labels.max()) + 1
    weight = torch.zeros(num_classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe")

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), train.labels) + weight_decay / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(objective)
    with torch.no_grad():
        return F.linear(queries, weight, bias).argmax(1)
