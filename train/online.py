"""What the representations are worth while they are trained, told by labels: a linear probe and kNN.

Neither changes the training, which has no part in their parameters and gives them representations without gradient. How
to read the numbers: both are of training images, whose augmented views are classified before anything is learnt from
them, so they show whether a run learns; what its encoder is worth says `train.evaluate`. Representations are those of
the encoder that is trained, also where a method exports its teacher.
"""

from typing import Any

import torch
import torch.nn.functional as F

from sharding.manifest import ShardSet
from train.engine.loop import StepDone
from train.evaluate.knn import votes
from train.processes.distributed import World

_LEARNING_RATE = 1e-3  # Adam's
_BANK = 4096  # images
_NEIGHBOURS, _TEMPERATURE = 20, 0.07


class Online:
    """A hook: each step trains the probe, softmax regression on representations (b, F) standardised each by itself.

    The bank of neighbours takes the global batch in at log points only, so that other steps cost one linear layer and
    the average of its gradient over ranks.
    """

    def __init__(self, num_features: int, num_classes: int, log_every: int, world: World) -> None:
        self._log_every, self._world = log_every, world
        self._probe = torch.zeros(num_classes, num_features + 1, device=world.device, requires_grad=True)
        self._optimizer = torch.optim.Adam([self._probe], _LEARNING_RATE)
        self._hits = torch.zeros(2, device=world.device)  # right answers, and questions, since the last log point
        self._bank = torch.zeros(0, num_features, device=world.device)
        self._bank_labels = torch.zeros(0, dtype=torch.int64, device=world.device)

    def __call__(self, state: StepDone) -> None:
        h, labels = _standardised(state), state.batch.labels
        scores = F.linear(h, self._probe[:, :-1], self._probe[:, -1])
        F.cross_entropy(scores, labels).backward()
        self._probe.grad = self._world.mean(self._probe.grad)  # type: ignore[arg-type]
        self._optimizer.step()
        self._optimizer.zero_grad()
        right = (scores.argmax(1) == labels).sum()
        self._hits += torch.stack([right, torch.full_like(right, len(labels))])

    def measure(self, state: StepDone) -> dict[str, torch.Tensor]:
        """Accuracies of this rank's images, percent: the probe's since the last log point; once the bank is not empty,
        kNN's of this batch. At a log point the bank then takes the batch in. Synchronises ranks."""
        h, labels = _standardised(state), state.batch.labels
        found = {"online_linear_percent": 100 * self._hits[0] / self._hits[1]}
        if len(self._bank):
            k = min(_NEIGHBOURS, len(self._bank))
            similarity, nearest = (F.normalize(h, dim=1) @ F.normalize(self._bank, dim=1).T).topk(k, dim=1)
            voted = votes(similarity, self._bank_labels[nearest], len(self._probe), _TEMPERATURE).argmax(1)
            found["online_knn_percent"] = 100 * (voted == labels).float().mean()
        if state.done % self._log_every == 0:
            self._hits.zero_()
            self._bank = torch.cat([self._world.gather(h), self._bank])[:_BANK]
            self._bank_labels = torch.cat([self._world.gather(labels), self._bank_labels])[:_BANK]
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer.state_dict(), **{name: getattr(self, name).detach() for name in _TENSORS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state`` was, on this device."""
        for name in _TENSORS:
            getattr(self, name).data = state[name].to(self._world.device)
        self._optimizer.load_state_dict(state["optimizer"])


_TENSORS = ("_probe", "_hits", "_bank", "_bank_labels")


def has_labels(shards: ShardSet) -> bool:
    """Whether all images have one, of two classes or more."""
    return len(shards.manifest.class_names) > 1 and bool((shards.index.label >= 0).all())


def _standardised(state: StepDone) -> torch.Tensor:
    assert state.loss.h is not None
    h = state.loss.h.float()
    return F.layer_norm(h, h.shape[-1:])
