"""Train steps that one would otherwise write: a method's own networks and initial weights, and around them plain torch,
with a loss that is written down from its paper, or lightly's. For two views, on one process."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from sharding.command import UserError
from train.config import Config
from train.engine import automatic
from train.optim.schedule import scaled_peak
from train.pretrain import build
from train.processes.distributed import World

T = TypeVar("T")
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of what two views (b, D) became


class PlainStep:
    """An update by the views of a batch; returns the loss. ``losses`` makes one from a method's settings."""

    def __init__(self, config: Config, losses: Callable[[Any], Loss], world: World) -> None:
        self.loss = losses(config.method)
        self.method: Any = build(config, world)
        self._tau = getattr(config.method, "tau", 1.0)  # share of a teacher that an update keeps
        optim, parameters = config.optim, [p for p in self.method.parameters() if p.requires_grad]
        options: dict[str, Any] = {"lr": scaled_peak(optim.learning_rate, config.run.global_batch_size, optim.scaling)}
        options |= {"weight_decay": optim.weight_decay, "fused": True}
        if optim.name == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, momentum=optim.momentum, **options)
        elif optim.name == "adamw":
            self.optimizer = torch.optim.AdamW(parameters, betas=(optim.momentum, optim.beta2), **options)
        else:
            raise UserError(f"optim.name: expected sgd or adamw, which torch has, found {optim.name}")
        self._dtype, self._device = automatic.dtype(config, world), world.device.type

    def __call__(self, views: list[torch.Tensor]) -> torch.Tensor:
        self.optimizer.zero_grad()
        with torch.autocast(self._device, self._dtype, enabled=self._dtype == torch.bfloat16):
            a, b = self._embeddings(torch.cat(views))
        loss = self.loss(a.float(), b.float())
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for teacher, student in self.method.teachers():
                for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                    old.lerp_(new, 1 - self._tau)
        return loss.detach()

    def _embeddings(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of two views; with a predictor, predictions and in the other views' places their targets."""
        method: Any = self.method
        z = method.projector(method.encoder(images))
        if not hasattr(method, "predictor"):
            return z.chunk(2)
        with torch.no_grad():
            target = method.teacher_projector(method.teacher_encoder(images)) if method.teachers() else z
        return method.predictor(z), target.detach().roll(len(target) // 2, 0)


def plain(settings: Any) -> Loss:
    """The loss of a method in a few lines of torch, from its paper. Raises UserError where there is none here."""

    def simclr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        z = F.normalize(torch.cat([a, b]), dim=1)
        logits = (z @ z.T / settings.temperature).fill_diagonal_(float("-inf"))
        return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(a)))

    def barlow(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = (F.batch_norm(z, None, None, training=True) for z in (a, b))
        c = a.T @ b / len(a)
        on, total = c.diagonal(), c.square().sum()
        return (on - 1).square().sum() + settings.off_diagonal * (total - on.square().sum())

    def vicreg(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        def terms(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            z = z - z.mean(0)
            c = z.T @ z / (len(z) - 1)
            off_diagonal = c.square().sum() - c.diagonal().square().sum()
            return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean(), off_diagonal / len(c)

        (hinge, covariance), (other_hinge, other_covariance) = terms(a), terms(b)
        return (
            settings.invariance * F.mse_loss(a, b)
            + settings.variance * (hinge + other_hinge) / 2
            + settings.covariance * (covariance + other_covariance)
        )

    def lejepa(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        z, t = torch.stack([a, b]), torch.linspace(0, 3, 17, device=a.device)
        phi, weights = (-t.square() / 2).exp(), torch.full_like(t, 3 / 8)
        weights[[0, -1]] /= 2
        x = (z @ F.normalize(torch.randn(z.shape[2], settings.slices, device=z.device), dim=0)).unsqueeze(-1) * t
        error = (x.cos().mean(1) - phi).square() + x.sin().mean(1).square()
        regularizer = len(a) * (error @ (weights * phi)).mean()
        return torch.lerp((z - z.mean(0)).square().mean(), regularizer, settings.regularizer)

    def cosine(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return -F.cosine_similarity(p, z).mean()

    losses = {"simclr": simclr, "barlow": barlow, "vicreg": vicreg, "lejepa": lejepa, "simsiam": cosine}
    return _chosen(losses | {"byol": _both_ways(cosine)}, settings)


def lightly(settings: Any) -> Loss:
    """The same by lightly. Raises ImportError where it is not installed."""
    from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, NTXentLoss, VICRegLoss
    from lightly.loss.lejepa_loss import SIGReg, lejepa_invariance_loss

    def lejepa(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:  # their LeJEPALoss, which wants local views as well
        z, sigreg = torch.stack([a, b]), SIGReg(num_vectors=settings.slices).to(a.device)
        share = settings.regularizer
        return share * sigreg(z) + (1 - share) * lejepa_invariance_loss(all_proj=z, global_proj=z)

    losses: dict[str, Callable[[], Loss]] = {
        "simclr": lambda: NTXentLoss(settings.temperature),
        "barlow": lambda: BarlowTwinsLoss(settings.off_diagonal),
        "vicreg": lambda: VICRegLoss(settings.invariance, settings.variance, settings.covariance),
        "lejepa": lambda: lejepa,
        "simsiam": NegativeCosineSimilarity,
        "byol": lambda: _both_ways(NegativeCosineSimilarity()),
    }
    return _chosen(losses, settings)()


def _both_ways(negative_cosine: Loss) -> Loss:
    """BYOL's sum over both views of squared distances on the sphere, from the mean over both."""
    return lambda p, z: 4 + 4 * negative_cosine(p, z)


def _chosen(losses: dict[str, T], settings: Any) -> T:
    if settings.name not in losses:
        raise UserError(
            f"method.name: expected one of {', '.join(losses)}, which are written down here, found {settings.name}"
        )
    return losses[settings.name]


METHODS = ("simclr", "barlow", "vicreg", "lejepa", "simsiam", "byol")
LOSSES = {"plain": plain, "lightly": lightly}
