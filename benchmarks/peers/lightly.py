"""Pretraining as lightly's examples have it: its transform, its loss, a DataLoader and a loop, with the networks,
initial weights, optimizer and length that `train.pretrain` has for the same configuration.

    python -m benchmarks.peers.lightly --config configs/cifar10-narrow-simclr.yaml

Images are decoded once and kept in memory; the rate follows a cosine without warm-up; one process. It writes a
checkpoint that `train.evaluate` reads. `benchmarks.beside_lightly` starts it.
"""

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from PIL import Image
from rich.progress import track
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from benchmarks.peers.steps import PlainStep, lightly
from pipeline.reading.reader import Reader
from pipeline.views import ViewSpec
from sharding.command import UserError, command
from sharding.manifest import ShardSet, open_shards
from train.config import Config, load_config
from train.engine import checkpoint
from train.engine.plan import plan_run
from train.pretrain import parser
from train.processes.distributed import World


@command("benchmarks.peers.lightly")
def main(arguments: Sequence[str] | None = None) -> int:
    options = parser("python -m benchmarks.peers.lightly", "Pretrain with lightly's transform, loss and loop.", "")
    given = options.parse_args(arguments)
    config = load_config(given.config, given.overrides)
    shards = open_shards(config.data.shards)
    total_steps = plan_run(config, shards.manifest.num_samples).total_steps
    step = PlainStep(config, lightly, World())
    schedule = CosineAnnealingLR(step.optimizer, total_steps)
    for _, views in zip(track(range(total_steps), "lightly"), _batches(config, shards), strict=False):
        loss = step(views)
        schedule.step()
    print(f"loss {loss:.4f} after {total_steps} steps")
    state = {"method": step.method.state_dict(), "optimizer": step.optimizer.state_dict(), "step": total_steps}
    state |= {"identity": checkpoint.identity_of(config, shards.manifest.fingerprint)}
    checkpoint.save(config.run.dir, total_steps, state | {"config": config.model_dump(mode="json")})
    return 0


def _batches(config: Config, shards: ShardSet) -> Iterator[list[torch.Tensor]]:
    """Endless, shuffled, of lightly's views."""
    with closing(Reader(shards)) as reader:
        files = [reader.read(sample).tobytes() for sample in range(shards.manifest.num_samples)]
    images: Any = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    transform = _transform(config.views)

    def views_of(batch: list[Image.Image]) -> list[torch.Tensor]:
        return [torch.stack(view) for view in zip(*map(transform, batch), strict=True)]

    torch.manual_seed(config.run.seed)
    loader = DataLoader(images, config.run.global_batch_size, shuffle=True, drop_last=True, collate_fn=views_of)
    while True:
        yield from loader


def _transform(views: Sequence[ViewSpec]) -> Callable[[Image.Image], list[torch.Tensor]]:
    """Their SimCLRTransform with the settings of ours. Raises UserError for views that it does not have."""
    from lightly.transforms import SimCLRTransform

    view = views[0]
    if [view.count for view in views] != [2] or view.solarize or view.interpolation != "bilinear":
        raise UserError("views: expected one group of two bilinear views without solarization; set views=simclr-cifar")
    return SimCLRTransform(
        view.size,
        view.jitter,
        cj_bright=view.brightness,
        cj_contrast=view.contrast,
        cj_sat=view.saturation,
        cj_hue=view.hue,
        min_scale=view.scale[0],
        random_gray_scale=view.grey,
        gaussian_blur=view.blur,
        sigmas=view.sigma,
        hf_prob=view.flip,
        normalize={"mean": list(view.mean), "std": list(view.std)},
    )


if __name__ == "__main__":
    sys.exit(main())
