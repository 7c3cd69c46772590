import torch
import torch.nn.functional as F

from benchmarks.rank import Counting
from tests.train.losses.test_clustering import transcribed_sinkhorn
from train.engine.step import TrainStep
from train.methods import Update, build_method
from train.methods.swav import Scores, SwAV, SwAVConfig
from train.model.draws import Draws
from train.model.encoder import EncoderConfig
from train.optim.optimizers import OptimConfig, build_optimizer
from train.processes.distributed import World

NO_DRAWS = Draws(0, 0, torch.arange(6))


def build(**fields: float) -> SwAV:
    torch.manual_seed(0)
    config = SwAVConfig.model_validate({"hidden": 16, "out": 8, "prototypes": 10, **fields})
    method = build_method(config, EncoderConfig(name="resnet18", width=8, stem="cifar"), World()).double()
    assert isinstance(method, SwAV)
    return method


def views() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, size, size, dtype=torch.float64, generator=generator) for size in (24, 24, 16, 16)]


def test_without_a_queue_an_update_gathers_nothing() -> None:
    for queue, count in ((0, 0), (6, 1)):
        world, config = Counting(), SwAVConfig(hidden=16, out=8, prototypes=10, queue=queue)
        method = build_method(config, EncoderConfig(name="resnet18", width=8, stem="cifar"), world).double()
        e = method(views(), NO_DRAWS)
        with torch.no_grad():
            method.after_update(Update(0.5, torch.ones(()), e))
        assert len(world.sent) == count


def transcribed(scores: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of the paper with section 3.2's crops: value with graph."""
    loss = torch.zeros(()).double()
    for i in range(2):
        q = transcribed_sinkhorn(scores[i].detach(), 0.05, 3)
        others = [v for v in range(len(scores)) if v != i]
        subloss = sum((-(q * F.log_softmax(scores[v] / 0.1, dim=1)).sum(1).mean() for v in others), torch.zeros(()))
        loss = loss + subloss / len(others)
    return loss / 2


def test_loss_and_gradient_are_the_papers() -> None:
    method = build()
    scores = method(views(), NO_DRAWS).scores.detach()
    gradients = []
    for loss in (transcribed, lambda s: method.loss(Scores(s, s, s)).value):
        leaf = scores.clone().requires_grad_()
        value = loss(leaf)
        gradients.append((value.detach(), *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


def test_scores_are_cosines() -> None:
    method = build()
    scores = method(views(), NO_DRAWS).scores
    assert scores.shape == (4, 6, 10)
    assert scores.abs().max() <= 1
    torch.testing.assert_close(method.prototypes.norm(dim=1), torch.ones(10).double(), rtol=1e-6, atol=0)


def test_prototypes_are_frozen_at_first_and_always_of_unit_length() -> None:
    method = build(frozen=0.2)
    optimizer = build_optimizer(OptimConfig(name="lars", weight_decay=0.01), method)
    step = TrainStep(method, method, optimizer, torch.float64)
    seen = [method.prototypes.detach().clone()]
    for number in range(3):
        step(views(), NO_DRAWS, 5.0, (number + 1) / 10)
        seen.append(method.prototypes.detach().clone())
        torch.testing.assert_close(seen[-1].norm(dim=1), torch.ones(10).double())
    torch.testing.assert_close(seen[2], F.normalize(seen[0], dim=1), rtol=0, atol=1e-12)
    assert (seen[3] - seen[2]).abs().max() > 1e-4


def test_a_refused_update_moves_nothing() -> None:
    method = build(queue=8, queue_starts=0)
    torch.nn.init.normal_(method.prototypes)
    made = method(views(), NO_DRAWS)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    with torch.no_grad():
        method.after_update(Update(0.5, torch.tensor(0.0), made))
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def test_codes_forbid_collapse() -> None:
    """Where all images score alike, codes are uniform: the loss is at least log K, and its least value is not there."""
    method = build()
    alike = F.normalize(torch.randn(10).double(), dim=0).expand(4, 6, 10)
    apart = torch.eye(10).double()[:6].expand(4, 6, 10)
    collapsed, spread = (method.loss(Scores(scores, scores, scores)) for scores in (alike, apart))
    assert collapsed.value > torch.tensor(10.0).log()
    assert spread.value < collapsed.value
    assert spread.metrics["prototypes_used"] > collapsed.metrics["prototypes_used"]


def test_codes_are_made_with_the_queue_once_it_is_full() -> None:
    """As in the authors' loop, with lists: it fills after ``queue_starts``, and is used from when it is full."""
    method = build(queue=12, queue_starts=0.15, epsilon=0.5)
    step = TrainStep(method, method, build_optimizer(OptimConfig(name="sgd"), method), torch.float64)
    kept: list[list[torch.Tensor]] = [[], []]
    for number in range(1, 6):
        made = method(views(), NO_DRAWS)
        scores, prototypes = made.scores[:2].detach(), method.prototypes.detach()
        for found, one, embeddings in zip(method._codes(scores), scores, kept, strict=True):
            full = len(embeddings) == 12
            rows = torch.cat([torch.stack(embeddings) @ prototypes.T, one]) if full else one
            torch.testing.assert_close(found, transcribed_sinkhorn(rows, 0.5, 3)[-6:])
        step(views(), NO_DRAWS, 0.01, number / 10)
        for embeddings, z in zip(kept, made.z[:2].detach(), strict=True):
            embeddings[:] = (embeddings + list(z))[-12:] if number / 10 > 0.15 else []
    assert method.queued == 24


def test_without_a_queue_there_is_no_more_state_than_before() -> None:
    assert not [name for name in build().state_dict() if "queue" in name]
