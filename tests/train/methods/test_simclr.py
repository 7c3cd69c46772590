import torch

from train.encoder import EncoderConfig
from train.losses import nt_xent
from train.methods.simclr import SimCLR, SimCLRConfig, same_size


def method() -> SimCLR:
    torch.manual_seed(0)
    config = SimCLRConfig(hidden=16, out=8, layers=2, temperature=0.2)
    return SimCLR(config, EncoderConfig(name="resnet18", width=8), gather=lambda z: z, rank=0)


def test_embeddings_and_loss() -> None:
    simclr = method()
    z = simclr([torch.randn(4, 3, 32, 32) for _ in range(2)])
    assert z.shape == (2, 4, 8)
    loss, metrics = simclr.loss(z)
    torch.testing.assert_close(loss, nt_xent(z, z, 0, 0.2))
    assert -1 <= metrics["alignment"].item() <= 1


def test_views_of_several_sizes() -> None:
    sizes = [32, 32, 16, 16, 16]
    views = [torch.randn(4, 3, size, size) for size in sizes]
    assert [len(group) for group in same_size(views)] == [2, 3]
    assert method()(views).shape == (5, 4, 8)
