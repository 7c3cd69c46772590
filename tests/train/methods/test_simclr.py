import torch

from train.distributed import World
from train.draws import Draws
from train.encoder import EncoderConfig
from train.losses.contrastive import nt_xent
from train.methods import build_method, same_size
from train.methods.simclr import Embeddings, SimCLRConfig

NO_DRAWS = Draws(0, 0, torch.arange(4))


def embeddings(views: list[torch.Tensor]) -> tuple[Embeddings, torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = SimCLRConfig(hidden=16, out=8, layers=2, temperature=0.2)
    simclr = build_method(config, EncoderConfig(name="resnet18", width=8), World())
    e = simclr(views, NO_DRAWS)
    return e, *simclr.loss(e)


def test_embeddings_and_loss() -> None:
    e, loss, metrics = embeddings([torch.randn(4, 3, 32, 32) for _ in range(2)])
    assert e.z.shape == (2, 4, 8)
    torch.testing.assert_close(loss, nt_xent(e.z, e.z, 0, 0.2))
    assert -1 <= metrics["alignment"].item() <= 1


def test_views_of_several_sizes() -> None:
    sizes = [32, 32, 16, 16, 16]
    views = [torch.randn(4, 3, size, size) for size in sizes]
    assert [len(group) for group in same_size(views)] == [2, 3]
    assert embeddings(views)[0].z.shape == (5, 4, 8)
