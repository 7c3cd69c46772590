import torch

from tests.train.evaluate.test_knn import CPU, clusters
from train.evaluate.features import Features
from train.evaluate.linear_sgd import LinearSGD
from train.optim.schedule import warmup_cosine


def test_a_grid_of_rates_is_trained_as_each_alone() -> None:
    train = clusters(400, 0, spread=1.5)
    rates = (1e-3, 0.1, 2.0)
    protocol = LinearSGD(learning_rate=rates, epochs=2, batch_size=64)
    together = protocol._trained(train, rates, CPU)
    for weights, rate in zip(together, rates, strict=True):
        torch.testing.assert_close(weights, _plain_sgd(protocol, train, rate))
    found = dict(protocol(train, clusters(300, 1, spread=1.5), CPU))
    assert found["learning rate chosen"] > 1e-3
    assert found["top-1 %"] > 60


def _plain_sgd(protocol: LinearSGD, train: Features, rate: float) -> torch.Tensor:
    """By nn.Linear and torch's SGD at that rate."""
    generator = torch.Generator().manual_seed(protocol.seed)
    start = 0.01 * torch.randn(7, 13, generator=generator)
    layer = torch.nn.Linear(12, 7)
    with torch.no_grad():
        layer.weight.copy_(start[:, :-1])
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9)
    orders = [torch.randperm(len(train), generator=generator) for _ in range(protocol.epochs)]
    batches = [batch for order in orders for batch in order.split(64)]
    for step, batch in enumerate(batches):
        peak = rate * 64 / 256
        optimizer.param_groups[0]["lr"] = warmup_cosine(step, total_steps=len(batches), warmup_steps=0, peak=peak)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(train.h[batch]), train.labels[batch]).backward()
        optimizer.step()
    return torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach()
