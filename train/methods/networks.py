"""Networks that several methods share: an encoder and a projector; with the mean of global views to predict; with a
predictor; with a predictor of a teacher's projections."""

from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import nn

from train.methods import Method, MethodConfig, Update, encode, same_size
from train.model.draws import Draws
from train.model.encoder import Encoder
from train.model.heads import Widths, mlp
from train.model.teacher import follow, teacher_of
from train.optim.schedule import cosine
from train.processes.distributed import World


class ProjectorConfig(MethodConfig):
    hidden: Widths = Field(2048, description="width of the projector's hidden layers, or a list of them all")
    out: int = Field(128, ge=1, description="dimensions of the embedding")
    layers: int = Field(3, ge=1, description="linear layers of the projector; a list of widths says so itself")


class Embeddings(NamedTuple):
    z: torch.Tensor  # (V, b, D)
    h: torch.Tensor  # (V, b, F)


class Projected(Method):
    """``z = projector(encoder(view))``; ``head``, or what takes its place, are the options of the projector's `mlp`."""

    head: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: ProjectorConfig, encoder: Encoder, world: World, **head: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(encoder.num_features, config.hidden, config.out, config.layers, **(head or self.head))
        self._config: Any = config  # the method's own kind
        self._world = world

    def forward(self, views: list[torch.Tensor], draws: Draws) -> Any:
        h = encode(self.encoder, views)
        return Embeddings(self.projector(h), h)


class Centred(NamedTuple):
    z: torch.Tensor  # (V, b, D)
    centre: torch.Tensor  # (1, b, D): the mean over global views
    h: torch.Tensor  # (V, b, F)


class Predicted(Projected):
    """Each view predicts the mean of the image's global views: the first ones of one size."""

    length_counts = True

    def forward(self, views: list[torch.Tensor], draws: Draws) -> Centred:
        z, h = super().forward(views, draws)
        return Centred(z, z[: len(same_size(views)[0])].mean(0, keepdim=True), h)


class PredictorConfig(ProjectorConfig):
    predictor_hidden: int = Field(512, ge=1, description="width of the predictor's hidden layer")


class Predictions(NamedTuple):
    z: torch.Tensor  # (V, b, D)
    p: torch.Tensor  # (V, b, D), predictor(z)
    h: torch.Tensor  # (V, b, F)


class WithPredictor(Projected):
    """``p = predictor(z)``: two layers, the second without BatchNorm."""

    def __init__(self, config: PredictorConfig, encoder: Encoder, world: World) -> None:
        super().__init__(config, encoder, world)
        self.predictor = mlp(config.out, config.predictor_hidden, config.out, last_norm=False)

    def forward(self, views: list[torch.Tensor], draws: Draws) -> Predictions:
        z, h = super().forward(views, draws)
        return Predictions(z, self.predictor(z), h)


class TeacherConfig(ProjectorConfig):
    tau: float = Field(0.996, ge=0, le=1, description="share of the teacher that an update keeps, at the start")
    hidden: Widths = Field(4096, description="width of the projector's and predictor's hidden layer")
    out: int = Field(256, ge=1, description="dimensions of projection and prediction")
    layers: int = Field(2, ge=1, description="linear layers of the projector")


class Matches(NamedTuple):
    predictions: torch.Tensor  # (V, b, D), of the student
    targets: torch.Tensor  # (V, b, D), of the teacher, without gradient
    h: torch.Tensor  # (V, b, F)


class WithTeacher(Projected):
    """``predictor(projector(encoder(view)))``, and a teacher's ``projector(encoder(view))``. The teacher follows by a
    moving average, whose tau goes from ``tau`` to 1 along a cosine. The last layers have no bias, as by the authors."""

    head: ClassVar = {"last_norm": False, "last_bias": False}

    def __init__(self, config: TeacherConfig, encoder: Encoder, world: World) -> None:
        super().__init__(config, encoder, world)
        self.predictor = mlp(config.out, config.hidden, config.out, last_norm=False, last_bias=False)
        self.teacher_encoder, self.teacher_projector = teacher_of(self.encoder), teacher_of(self.projector)

    def forward(self, views: list[torch.Tensor], draws: Draws) -> Matches:
        h = encode(self.encoder, views)
        with torch.no_grad():
            targets = self.teacher_projector(encode(self.teacher_encoder, views))
        return Matches(self.predictor(self.projector(h)), targets, h)

    def teachers(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.teacher_encoder, self.encoder), (self.teacher_projector, self.projector)]

    def after_update(self, update: Update) -> None:
        follow(self.teachers(), cosine(update.progress, self._config.tau, 1.0), update.accepted)
