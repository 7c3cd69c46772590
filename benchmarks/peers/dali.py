"""DALI from shard to batch: its reader with its shuffle buffer, one decode, its random crops, jitter and blur.

https://docs.nvidia.com/deeplearning/dali/user-guide/docs/examples/general/data_loading/dataloading_webdataset.html
Its jitter is not torchvision's: fixed order, contrast about 128, hue by a linear approximation.
"""

from contextlib import ExitStack
from typing import Any

import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import pipeline_def
from nvidia.dali.plugin.base_iterator import LastBatchPolicy
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from benchmarks.peers import Peer, PeerOptions
from benchmarks.peers.dataloader import batches_of
from pipeline.views import ViewSpec


def build(options: PeerOptions, stack: ExitStack) -> Peer:
    on_gpu = torch.cuda.is_available()
    archives = [str(options.shards.root / shard.path) for shard in options.shards.manifest.shards]
    pipeline: Any = _graph(
        archives,
        [archive.removesuffix(".tar") + ".idx" for archive in archives],
        options.specs,
        on_gpu,
        batch_size=options.batch_size,
        num_threads=options.num_threads,
        device_id=0 if on_gpu else None,
        prefetch_queue_depth=options.prefetch,
    )
    names = [f"view{number}" for number in range(len(options.specs))]
    batches = DALIGenericIterator(
        [pipeline], [*names, "label"], size=-1, auto_reset=True, last_batch_policy=LastBatchPolicy.PARTIAL
    )
    return batches_of((([batch[name] for name in names], batch["label"]) for [batch] in batches), stack)


@pipeline_def
def _graph(archives: list[str], indices: list[str], specs: tuple[ViewSpec, ...], on_gpu: bool) -> Any:
    read: Any = fn.readers.webdataset(
        paths=archives, index_paths=indices, ext=["jpg", "cls"], random_shuffle=True, name="shards"
    )
    jpegs, labels = read
    images: Any = fn.decoders.image(jpegs, device="mixed" if on_gpu else "cpu", output_type=types.DALIImageType.RGB)
    return (*(_view(images, spec) for spec in specs), fn.pad(labels))


def _view(images: Any, spec: ViewSpec) -> Any:
    images = fn.random_resized_crop(
        images,
        size=spec.size,
        random_area=list(spec.scale),
        random_aspect_ratio=list(spec.ratio),
        interp_type=types.DALIInterpType.INTERP_CUBIC if spec.is_cubic else types.DALIInterpType.INTERP_LINEAR,
        antialias=True,
    )
    # Factors of 1 and a shift of 0 change nothing: jitter and grey apply with their probabilities.
    jitter = _coin(spec.jitter)
    grey = _coin(spec.grey)
    images = fn.color_twist(
        images,
        brightness=1 + jitter * _uniform(-spec.brightness, spec.brightness),
        contrast=1 + jitter * _uniform(-spec.contrast, spec.contrast),
        saturation=(1 - grey) * (1 + jitter * _uniform(-spec.saturation, spec.saturation)),
        hue=jitter * _uniform(-360 * spec.hue, 360 * spec.hue),
    )
    # A standard deviation this small leaves the image as it is.
    blur = _coin(spec.blur)
    images = fn.gaussian_blur(images, window_size=spec.kernel, sigma=blur * _uniform(*spec.sigma) + (1 - blur) * 0.01)
    return fn.crop_mirror_normalize(
        images,
        dtype=types.DALIDataType.FLOAT,
        output_layout="CHW",
        mean=[255 * value for value in spec.mean],
        std=[255 * value for value in spec.std],
        mirror=fn.random.coin_flip(probability=spec.flip),
    )


def _coin(probability: float) -> Any:
    """1 or 0."""
    return fn.cast(fn.random.coin_flip(probability=probability), dtype=types.DALIDataType.FLOAT)


def _uniform(low: float, high: float) -> Any:
    return fn.random.uniform(range=[low, high])
