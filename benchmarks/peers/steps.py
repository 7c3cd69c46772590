"""The train step as one would write it by hand, around a method's own networks and initial weights, on one process:
with the method's loss, or with lightly's."""

from collections.abc import Callable
from typing import Any

import torch

from pipeline.loader import Batch
from sharding.command import UserError
from train.config import Config
from train.engine import automatic
from train.methods import Update
from train.model.draws import Draws
from train.optim.schedule import scaled_peak
from train.pretrain import build
from train.processes.distributed import World


class PlainStep:
    """An update by a batch; returns the loss. ``theirs`` makes, from the method's settings, a loss of its E. Raises
    UserError for an optimizer that torch does not have."""

    def __init__(
        self, config: Config, world: World, theirs: Callable[[Any], Callable[[Any], Any]] | None = None
    ) -> None:
        self.method = build(config, world)
        self._theirs = theirs(config.method) if theirs else None
        optim, parameters = config.optim, [p for p in self.method.parameters() if p.requires_grad]
        rate = scaled_peak(optim.learning_rate, config.run.global_batch_size, optim.scaling)
        options: dict[str, Any] = {"lr": rate, "weight_decay": optim.weight_decay, "fused": True}
        if optim.name not in ("sgd", "adamw"):
            raise UserError(f"optim.name: expected sgd or adamw, which torch has, found {optim.name}")
        if optim.name == "sgd":
            self.optimizer: Any = torch.optim.SGD(parameters, momentum=optim.momentum, **options)
        else:
            self.optimizer = torch.optim.AdamW(parameters, betas=(optim.momentum, optim.beta2), **options)
        self._seed, self._accepted = config.run.seed, torch.ones((), device=world.device)
        self._dtype, self._device = automatic.dtype(config, world), world.device.type

    def __call__(self, batch: Batch) -> torch.Tensor:
        draws, method = Draws(self._seed, batch.step, batch.ids), self.method
        self.optimizer.zero_grad()
        with torch.autocast(self._device, self._dtype, enabled=self._dtype == torch.bfloat16):
            e = method(batch.views, draws)
        labels = batch.labels if method.takes_labels else None
        loss: torch.Tensor = self._theirs(e) if self._theirs else method.loss(e, labels, draws).value
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            method.after_update(Update(0.5, self._accepted, type(e)(*(tensor.detach() for tensor in e))))
        return loss.detach()


def lightly(settings: Any) -> Callable[[Any], Any]:
    """lightly's loss of two views' E. Raises ImportError where it is not installed, UserError for other methods."""
    from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, NTXentLoss, VICRegLoss
    from lightly.loss.lejepa_loss import SIGReg, lejepa_invariance_loss

    def lejepa(e: Any) -> Any:  # as their LeJEPALoss, which wants local views as well
        invariance = lejepa_invariance_loss(all_proj=e.z, global_proj=e.z)
        return torch.lerp(invariance, SIGReg(num_vectors=settings.slices).to(e.z.device)(e.z), settings.regularizer)

    def cosine(predictions: torch.Tensor, targets: torch.Tensor) -> Any:
        return NegativeCosineSimilarity()(predictions.flatten(0, 1), targets.detach().flip(0).flatten(0, 1))

    losses: dict[str, Callable[[Any], Any]] = {
        "simclr": lambda e: NTXentLoss(settings.temperature)(*e.z),
        "barlow": lambda e: BarlowTwinsLoss(settings.off_diagonal)(*e.z),
        "vicreg": lambda e: VICRegLoss(settings.invariance, settings.variance, settings.covariance)(*e.z),
        "lejepa": lejepa,
        "simsiam": lambda e: cosine(e.p, e.z),
        "byol": lambda e: 4 + 4 * cosine(e.predictions, e.targets),  # the sum over views of squared distances
    }
    if settings.name not in losses:
        raise UserError(f"method.name: expected one of {', '.join(losses)} for lightly's loss, found {settings.name}")
    return losses[settings.name]
