"""MAE (He et al., "Masked autoencoders are scalable vision learners", 2022).

A ViT sees a quarter of an image's patches, drawn uniformly for each image (and view); a small ViT gets its tokens and,
in the places of the other patches, a mask token, and predicts their pixels. The loss is the mean squared error over
masked patches alone, each of them standardised (section 3).

All as in facebookresearch/mae, down to initialisation and decay of both tokens; evaluation takes the class token.
"""

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import nn

from sharding.command import UserError
from train.losses.reconstruction import masked_error, patches, standardised
from train.methods import Loss, Method, MethodConfig, Recipe
from train.model.draws import Draws
from train.model.encoder import Encoder, sines_and_cosines
from train.processes.distributed import World


class MAEConfig(MethodConfig):
    min_views: ClassVar[int] = 1

    name: Literal["mae"] = "mae"
    masked: float = Field(0.75, gt=0, lt=1, description="fraction of the patches that the encoder does not see")
    width: int = Field(512, ge=4, multiple_of=4, description="of the decoder")
    depth: int = Field(8, ge=1, description="blocks of the decoder")
    heads: int = Field(16, ge=1, description="attention heads of the decoder; they divide its width")
    standardise: bool = Field(True, description="predict each patch less its mean, over its standard deviation")

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> "MAEConfig":
        if self.width % self.heads:
            raise ValueError(f"heads: expected a divisor of the decoder's width {self.width}, found {self.heads}")
        return self


class Reconstruction(NamedTuple):
    h: torch.Tensor  # (V, b, F): class tokens of what was seen
    predictions: torch.Tensor  # (V, b, M, P) of the M masked patches of P values
    targets: torch.Tensor


class MAE(Method):
    Config = MAEConfig
    recipe = Recipe(
        "mae",
        encoder={"name": "timm:vit_base_patch16_224"},
        optim={"name": "adamw", "learning_rate": 1.5e-4, "weight_decay": 0.05, "beta2": 0.95}
        | {"epochs": 800, "warmup_epochs": 40},
        run={"dir": "runs/mae", "global_batch_size": 4096},
    )
    images_meet = False

    def __init__(self, config: MAEConfig, encoder: Encoder, world: World) -> None:
        super().__init__()
        self.encoder = encoder
        vit = _vit(encoder)
        self._patch, self._grid = vit.patch_embed.patch_size[0], vit.patch_embed.grid_size
        positions = sines_and_cosines(self._grid[0], self._grid[1], encoder.num_features)
        vit.pos_embed.requires_grad_(False).zero_()[0, -len(positions) :] = positions  # none of the class token
        self.decoder = Decoder(config, encoder.num_features, self._grid, 3 * self._patch**2)
        _initialise(self, vit)
        self._config = config
        self._num_kept = max(1, int(len(positions) * (1 - config.masked)))

    def forward(self, views: list[torch.Tensor], draws: Draws) -> Reconstruction:
        made = [self._reconstruct(view, draws, number) for number, view in enumerate(views)]
        return Reconstruction(*(torch.stack(tensors) for tensors in zip(*made, strict=True)))

    def loss(self, e: Reconstruction, labels: torch.Tensor | None = None, draws: Draws | None = None) -> Loss:
        return Loss(masked_error(e.predictions, e.targets), {"prediction_std": e.predictions.detach().std(-1).mean()})

    def _reconstruct(self, images: torch.Tensor, draws: Draws, number: int) -> tuple[torch.Tensor, ...]:
        size = tuple(side * self._patch for side in self._grid)
        if images.shape[2:] != size:
            raise UserError(
                f"method.name=mae: expected views of {size[0]} px, as the encoder's position embeddings are, found "
                f"{images.shape[-1]}; set encoder.image_size={images.shape[-1]} or views.size={size[0]}"
            )
        order = draws.permutation(f"mask {number}", self._grid[0] * self._grid[1])
        kept, masked = order.split([self._num_kept, order.shape[1] - self._num_kept], dim=1)
        targets = _rows(patches(images, self._patch), masked)
        tokens = seen(self.encoder.backbone, images, kept)
        predictions = self.decoder(tokens, order, self._num_kept)
        return tokens[:, 0], predictions, standardised(targets) if self._config.standardise else targets


def seen(vit: Any, images: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The ViT's tokens (b, prefix + K, D) of the class and of those patches (b, K) that are kept, as
    `timm.models.VisionTransformer.forward_features` makes them of all."""
    tokens = vit._pos_embed(vit.patch_embed(images))
    prefix, grid = tokens.split([vit.num_prefix_tokens, tokens.shape[1] - vit.num_prefix_tokens], dim=1)
    tokens = vit.blocks(vit.norm_pre(torch.cat([prefix, _rows(grid, kept)], dim=1)))
    h: torch.Tensor = vit.fc_norm(vit.norm(tokens))  # one of the two is the identity
    return h


class Decoder(nn.Module):
    """A ViT from tokens of the seen patches to the values of the others."""

    positions: torch.Tensor

    def __init__(self, config: MAEConfig, num_features: int, grid: tuple[int, int], values: int) -> None:
        from timm.models.vision_transformer import Block

        super().__init__()
        self.embed = nn.Linear(num_features, config.width)
        self.mask = nn.Parameter(0.02 * torch.randn(1, 1, config.width))
        blocks = (Block(config.width, config.heads, qkv_bias=True) for _ in range(config.depth))
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(config.width, eps=1e-6))  # as in all blocks
        self.predict = nn.Linear(config.width, values)
        self.register_buffer("positions", sines_and_cosines(*grid, config.width), persistent=False)

    def forward(self, tokens: torch.Tensor, order: torch.Tensor, num_kept: int) -> torch.Tensor:
        """Tokens (b, prefix + K, D), the first K of ``order`` (b, N) -> predictions (b, N - K, P) of the others."""
        tokens = self.embed(tokens)
        num_masked, num_prefix = order.shape[1] - num_kept, tokens.shape[1] - num_kept
        tokens = torch.cat([tokens, self.mask.expand(len(tokens), num_masked, -1).to(tokens.dtype)], dim=1)
        places = torch.cat([tokens.new_zeros(len(tokens), num_prefix, tokens.shape[2]), self.positions[order]], dim=1)
        predictions: torch.Tensor = self.predict(self.blocks(tokens + places)[:, -num_masked:])
        return predictions


def _initialise(method: nn.Module, vit: Any) -> None:
    """As facebookresearch/mae does; patches are embedded by what counts as a linear layer."""
    for parameter in (p for layer in method.modules() if isinstance(layer, nn.Linear) for p in layer.parameters()):
        (nn.init.xavier_uniform_ if parameter.ndim > 1 else nn.init.zeros_)(parameter)
    nn.init.xavier_uniform_(vit.patch_embed.proj.weight.view(vit.embed_dim, -1))
    if vit.cls_token is not None:
        nn.init.normal_(vit.cls_token, std=0.02)


def _rows(tokens: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """(b, N, D) and (b, K) -> (b, K, D)."""
    return tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2]))


def _vit(encoder: Encoder) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(encoder.backbone, VisionTransformer) or encoder.backbone.pos_embed is None:
        raise UserError(
            f"method.name=mae: expected a ViT as encoder.name, e.g. timm:vit_base_patch16_224, found "
            f"{type(encoder.backbone).__name__.lstrip('_')}, which cannot leave out patches"
        )
    return encoder.backbone
