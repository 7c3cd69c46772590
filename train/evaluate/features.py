"""Representations of a data set under a frozen encoder: made once by all processes, kept on the disk, and mapped.

A folder of them is named by a hash of the encoder's weights, the data's fingerprint and the view, and appears whole or
not at all. It holds ``h`` (float32, row i that of sample i), ids of those that there are, and their checksum.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from pipeline.loader import Loader
from pipeline.order import Sequential
from pipeline.plan import Ints
from pipeline.views import ViewSpec, flatten
from sharding.command import UserError
from sharding.manifest import ShardSet
from sharding.progress import steps
from sharding.storage import checksum
from train.evaluate.data import Images
from train.model.encoder import Encoder
from train.processes.distributed import World

log = logging.getLogger(__name__)

FEATURES = "features"  # the folder for them, beside the checkpoints
_VERSION = 1  # of the files
_BATCH = 256  # views of a process that pass the network at a time
TILE = 8192  # representations in memory at a time


@dataclass(frozen=True)
class Features:
    """Representations of n images on the host, read from the disk tile by tile.

    h       (N, D) float32, row i that of sample i
    ids     (n,) int64, the samples that are meant
    labels  (n,) int64, theirs; -1: none
    mean    (D,), is subtracted from what is read, which is then divided by ``std`` (D,)
    """

    h: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor
    mean: torch.Tensor | float = 0.0
    std: torch.Tensor | float = 1.0

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, chosen: torch.Tensor) -> "Features":
        """A part of the images, by position or by a mask (n,)."""
        return replace(self, ids=self.ids[chosen], labels=self.labels[chosen])

    def tiles(self, device: torch.device, size: int = TILE) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(m, D) representations and (m,) labels of consecutive images, on the device."""
        for ids, labels in zip(self.ids.split(size), self.labels.split(size), strict=True):
            yield ((self.h[ids] - self.mean) / self.std).to(device), labels.to(device)

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (D,) and standard deviation (D,), float32. Raises `UserError` unless all values are finite, and some
        differ."""
        tiles = (h.double() for h, _ in self.tiles(torch.device("cpu")))
        sums = torch.stack([torch.stack([h.sum(0), h.square().sum(0)]) for h in tiles]).sum(0)
        mean = sums[0] / len(self)
        std = (sums[1] / len(self) - mean.square()).clamp_min(0).sqrt()
        if not sums.isfinite().all():
            raise UserError("some representations are NaN or infinite; evaluate an earlier checkpoint")
        if not (std > 1e-6 * mean.abs().max()).any():
            raise UserError("all images have the same representation; the encoder has collapsed")
        return mean.float(), std.float()


def extract(encoder: Encoder, images: Images, view: ViewSpec, folder: Path, world: World, **options: Any) -> Features:
    """Representations of the images, made by all ranks, and with them those of all images of the shards, unless they
    are in ``folder`` already, which is on a disk that all ranks reach; all ranks map them.
    ``options`` are `Loader`'s (backend, num_threads, cache, ...). Images that cannot be decoded are left out, and named
    in the log. Raises `UserError` unless all values are finite, and some differ.
    """
    path = folder / hash_of(encoder, images.shards, view)
    world.require_agreement({"the encoder, the images or the view to evaluate": path.name})
    if not (are_there := world.broadcast(world.is_main and _is_sound(path))):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="tmp-", dir=folder) if world.is_main else nullcontext() as made:
            unfinished = Path(str(world.broadcast(made)))
            _write_share(encoder, images.shards, view, unfinished, world, options)
            world.barrier()
            if world.is_main:
                _finish(unfinished, encoder.num_features, images.shards.manifest.num_samples)
                shutil.rmtree(path, ignore_errors=True)
                unfinished.rename(path)
            world.barrier()
    found = _open(path, images)
    if world.is_main:
        found.moments()
        if are_there and (missing := np.setdiff1d(images.ids, found.ids.numpy()).tolist()):
            log.warning("%s: left out, as they could not be decoded: samples %s", images.shards.directory, missing)
    return found


def share(num_images: int, tile: int, world: World) -> slice:
    """This rank's images: whole tiles, the same on any number of ranks, so that no bit of what is made of them differs.
    Rank 0 has some, others may have none."""
    num_tiles = -(-num_images // tile)
    first, last = (-(-rank * num_tiles // world.size) * tile for rank in (world.rank, world.rank + 1))
    return slice(first, min(last, num_images))


def hash_of(encoder: Encoder, shards: ShardSet, view: ViewSpec) -> str:
    """Of all that decides the representations of these images, seen so."""
    words = f"{_VERSION} {shards.manifest.fingerprint} {view.model_dump_json()} {weights_of(encoder)}"
    return xxhash.xxh3_128_hexdigest(words.encode())


def weights_of(encoder: Encoder) -> str:
    """A hash by which evaluations tell encoders apart: of their parameters and buffers."""
    digest = xxhash.xxh3_128()
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def represent(
    encoder: Encoder, images: Images, views: Sequence[ViewSpec], world: World, options: dict[str, Any]
) -> Iterator[tuple[Ints, torch.Tensor]]:
    """Ids (b,) and, of V views, representations (V, b, D) on the host, batch by batch of this rank's `share`."""
    size = max(1, _BATCH // (num_views := len(flatten(views))))
    order = Sequential(images.ids[share(len(images.ids), size, world)], size)
    encoder.to(world.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    what = f"features of {images.shards.directory}"
    with Loader(images.shards, views, seed=0, order=order, **options) as loader:
        for batch in steps(loader, what, order.num_steps, shown=world.is_main):
            with torch.inference_mode():
                h = encoder(torch.cat(batch.views)).float().cpu()
            yield batch.ids.cpu().numpy(), h.unflatten(0, (num_views, -1))


def _write_share(
    encoder: Encoder, shards: ShardSet, view: ViewSpec, folder: Path, world: World, options: dict[str, Any]
) -> None:
    everything, decoded = Images(shards, np.arange(shards.manifest.num_samples)), list[int]()
    (folder / "h").touch()
    with (folder / "h").open("r+b") as file:
        for ids, (h,) in represent(encoder, everything, (view,), world, options):
            for sample, row in zip(ids.tolist(), h.numpy(), strict=True):
                file.seek(sample * row.nbytes)
                file.write(row)
                decoded.append(sample)
    np.save(folder / f"ids-{world.rank}.npy", np.array(decoded, dtype=np.int64))


def _finish(folder: Path, num_features: int, num_samples: int) -> None:
    os.truncate(folder / "h", 4 * num_features * num_samples)  # also where the last ones could not be decoded
    meta = {"shape": [num_samples, num_features], "checksum": _checksum(folder)}
    (folder / "meta.json").write_text(json.dumps(meta))


def _ids(folder: Path) -> Ints:
    return np.sort(np.concatenate([np.load(path) for path in folder.glob("ids-*.npy")]))


def _checksum(folder: Path) -> str:
    with (folder / "h").open("rb") as file:
        return checksum(file) + xxhash.xxh3_64_hexdigest(_ids(folder).tobytes())


def _is_sound(folder: Path) -> bool:
    """Whether there are features; reads all of them."""
    if not folder.exists():
        return False
    try:
        if json.loads((folder / "meta.json").read_text())["checksum"] != _checksum(folder):
            raise ValueError("its checksum differs")
    except (OSError, EOFError, ValueError, KeyError) as error:
        log.warning("%s: these features are damaged, and are made again (%s)", folder, error)
        return False
    return True


def _open(folder: Path, images: Images) -> Features:
    ids, shape = np.intersect1d(_ids(folder), images.ids), json.loads((folder / "meta.json").read_text())["shape"]
    # "c": copy on write, because torch has no tensors that cannot be written to.
    h = torch.from_numpy(np.memmap(folder / "h", np.float32, "c", shape=tuple(shape)))
    return Features(h, torch.from_numpy(ids), torch.from_numpy(images.shards.index.label[ids].astype(np.int64)))
