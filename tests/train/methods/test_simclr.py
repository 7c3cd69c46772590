import torch

from tests.processes import run_ranks
from train.losses.contrastive import nt_xent
from train.methods import build_method, same_size
from train.methods.networks import Embeddings
from train.methods.simclr import SimCLRConfig
from train.model.batchnorm import synchronize_batchnorm
from train.model.draws import Draws
from train.model.encoder import EncoderConfig
from train.processes.distributed import World

NO_DRAWS = Draws(0, 0, torch.arange(4))


def embeddings(views: list[torch.Tensor]) -> tuple[Embeddings, torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = SimCLRConfig(hidden=16, out=8, layers=2, temperature=0.2)
    simclr = build_method(config, EncoderConfig(name="resnet18", width=8), World())
    e = simclr(views, NO_DRAWS)
    return e, *simclr.loss(e)[:2]


def test_embeddings_and_loss() -> None:
    e, loss, metrics = embeddings([torch.randn(4, 3, 32, 32) for _ in range(2)])
    assert e.z.shape == (2, 4, 8)
    torch.testing.assert_close(loss, nt_xent(e.z, e.z, 0, 0.2))
    assert metrics == {}


def test_a_projector_without_norms_is_vissls() -> None:
    config = SimCLRConfig(norm="none", layers=2, hidden=16, out=8)
    projector = build_method(config, EncoderConfig(name="resnet18", width=8), World()).projector
    shapes = [tuple(parameter.shape) for parameter in projector.parameters()]  # type: ignore[union-attr]
    assert shapes == [(16, 64), (16,), (8, 16), (8,)], "mlp {dims: [64, 16], use_relu: True}, mlp {dims: [16, 8]}"


def test_views_of_several_sizes() -> None:
    sizes = [32, 32, 16, 16, 16]
    views = [torch.randn(4, 3, size, size) for size in sizes]
    assert [len(group) for group in same_size(views)] == [2, 3]
    assert embeddings(views)[0].z.shape == (5, 4, 8)


LOSSES = ("ntxent", "dcl", "dclw", "spectral", "align_uniform")


def gradients(world: World) -> dict[str, torch.Tensor]:
    """Of all parameters, by each of the losses."""
    found: dict[str, torch.Tensor] = {}
    rows = slice(world.rank * 4 // world.size, (world.rank + 1) * 4 // world.size)
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=generator)[rows] for _ in range(3)]
    for loss in LOSSES:
        torch.manual_seed(0)
        config = SimCLRConfig.model_validate({"loss": loss, "hidden": 16, "out": 8, "layers": 2})
        simclr = build_method(config, EncoderConfig(name="resnet18", width=8, stem="cifar"), world).double()
        wrapped = world.wrap(synchronize_batchnorm(simclr, world))
        simclr.loss(wrapped(views, NO_DRAWS.rows(rows))).value.backward()
        found |= {f"{loss}.{name}": p.grad for name, p in simclr.named_parameters() if p.grad is not None}
    return found


def test_two_processes_have_the_gradients_of_one_by_all_losses() -> None:
    expected = gradients(World())
    assert {name.split(".")[0] for name in expected} == set(LOSSES)
    for found in run_ranks(gradients, 2):
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9)
