"""FFCV: its own file format, memory-mapped, and a pipeline of its transforms compiled by Numba, one a view.

https://docs.ffcv.io/making_dataloaders.html

It does less than the others, so that its figure is an upper bound of what it would reach with all operations:
version 1.0.2 has no hue, greyscale, blur or solarize. Brightness, contrast and saturation are there, each with a
probability of its own and in a fixed order. OpenCV resizes by area. Its ``jpg`` mode, used as documented, encodes the
images anew (quality 90, 4:2:0), which makes them smaller and faster to decode than the originals of the others.
On the other hand every view decodes the whole image again: two pipelines may share a field, not a decoder.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from ffcv import transforms
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.decoders import CenterCropRGBImageDecoder, RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.pipeline_spec import PipelineSpec
from ffcv.writer import DatasetWriter
from torchvision.datasets import ImageFolder

from benchmarks.peers import PeerOptions
from benchmarks.peers.dataloader import IteratorPeer, name_of, temporary_directory
from benchmarks.peers.imagefolder import unpack
from pipeline.views import ViewSpec

_PASSES = 1000  # in one: between two, the loader pauses and allocates anew


def build(options: PeerOptions) -> IteratorPeer:
    directory = temporary_directory(options)
    images, beton = name_of(directory) / "images", name_of(directory) / "images.beton"
    images.mkdir()
    unpack(options.shards, images)
    # In a process that has not run FFCV's loader and will not: its writer forks.
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        process.submit(_write, images, beton).result()
    return IteratorPeer(_batches(beton, options), options.prefetch + 1, directory)


def _write(images: Path, beton: Path) -> None:
    fields = {"image": RGBImageField(write_mode="jpg"), "label": IntField()}
    DatasetWriter(str(beton), fields).from_indexed_dataset(ImageFolder(str(images)))


def _batches(beton: Path, options: PeerOptions) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    """Compiles and starts its thread with the first batch, when other peers have forked their workers."""
    torch_threads = torch.get_num_threads()
    loader = Loader(
        str(beton),
        options.batch_size,
        num_workers=options.num_threads,
        os_cache=True,
        order=OrderOption.RANDOM,
        indices=np.tile(np.arange(options.shards.manifest.num_samples, dtype=np.uint64), _PASSES),
        pipelines={"image": None, **{f"view{i}": _pipeline(spec) for i, spec in enumerate(options.specs)}},
        batches_ahead=options.prefetch,
    )
    while True:
        one_pass = iter(loader)
        try:
            for label, *views in one_pass:
                torch.set_num_threads(torch_threads)  # the loader has changed it for the whole process
                yield views, label
        finally:
            one_pass.close()
            one_pass.join()


def _pipeline(spec: ViewSpec) -> PipelineSpec:
    mean, std = 255 * np.array(spec.mean), 255 * np.array(spec.std)
    changes: list[Operation] = [
        transforms.RandomHorizontalFlip(spec.flip),
        transforms.RandomBrightness(spec.brightness, spec.jitter),
        transforms.RandomContrast(spec.contrast, spec.jitter),
        transforms.RandomSaturation(spec.saturation, spec.jitter),
        transforms.NormalizeImage(mean, std, np.float32),
        transforms.ToTensor(),
        transforms.ToTorchImage(),
    ]
    return PipelineSpec("image", _decoder(spec), changes)


def _decoder(spec: ViewSpec) -> Operation:
    size = (spec.size, spec.size)
    if spec.crop == "center":
        return CenterCropRGBImageDecoder(size, spec.size / spec.resize)
    return RandomResizedCropRGBImageDecoder(size, spec.scale, spec.ratio)
