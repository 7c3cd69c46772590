"""SSL-HSIC (Li, Pogodin, Sutherland & Gretton, "Self-supervised learning with kernel dependence maximization", 2021).

    loss = gamma sqrt(HSIC(Z, Z)) - HSIC(Z, Y)

Z are normalised embeddings and Y their image: embeddings shall depend on the image and vary little otherwise. The
kernel of Z is the inverse multiquadric ``c / sqrt(c^2 + |x - y|^2)``, approximated by random Fourier features that are
new each step and the same on all processes. The M = 2 V embeddings of an image are BYOL's: predictions of the online
network, and projections of a target that follows it (without gradient).

Substituted: features are drawn from the kernel's exact spectrum (deepmind/ssl_hsic: from a grid of 10,000 frequencies);
c stays at 1, where theirs starts before Adam (3e-4) tunes it for the kernel's largest gradient. That tuning has its
fixed point at ``c^2 = |x - y|^2 / 2``, so at 1 for embeddings that are spread out. The target starts as a copy (there:
by itself); evaluation takes the online encoder (there: its moving average with decay 0.999).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from train.losses.distribution import fourier_features, hsic_with_image, hsic_with_itself
from train.methods import Loss, Recipe
from train.methods.networks import Matches, TeacherConfig, WithTeacher
from train.model.draws import Draws


class SSLHSICConfig(TeacherConfig):
    name: Literal["ssl-hsic"] = "ssl-hsic"
    gamma: float = Field(3.0, ge=0, description="weight of the embeddings' kernel variance")
    kernel_scale: float = Field(1.0, gt=0, description="c of the inverse multiquadric kernel")
    features: int = Field(512, ge=1, description="random Fourier features of the kernel")
    tau: float = Field(0.99, ge=0, le=1, description="the target's rate at the start; 1 at the end")


class SSLHSIC(WithTeacher):
    Config = SSLHSICConfig
    recipe = Recipe(
        "byol",
        optim={"name": "lars", "learning_rate": 0.4, "weight_decay": 1e-6, "epochs": 1000, "warmup_epochs": 10},
        run={"dir": "runs/ssl-hsic", "global_batch_size": 4096},
    )

    def loss(self, e: Matches, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        assert draws is not None
        z = F.normalize(torch.cat([e.predictions, e.targets.detach()]), dim=-1)
        z = self._world.gather(z, dim=1)
        first, second = (self._features(z, name, draws) for name in ("first", "second"))
        with_image, with_itself = hsic_with_image(first), hsic_with_itself(first, second)
        value = self._config.gamma * (with_itself + 1e-12).sqrt() - with_image  # the root has no gradient at 0
        return Loss(value, {"hsic_image": with_image.detach(), "hsic_self": with_itself.detach()})

    def _features(self, z: torch.Tensor, name: str, draws: Draws) -> torch.Tensor:
        size = self._config.features
        directions = draws.shared_normal(f"{name}.directions", z.shape[-1], size).to(z)
        radii = draws.shared_normal(f"{name}.radii", size).to(z)
        phases = draws.shared_uniform(f"{name}.phases", size).to(z)
        return fourier_features(z, directions, radii, phases, self._config.kernel_scale)
