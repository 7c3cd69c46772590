"""Loaders that a user would otherwise choose, each as its own documentation recommends, with the same augmentation
as far as they have it.

They draw their own randomness, so they cannot execute a plan and are no backends: here they are only timed. All of
them end with normalised float32 views (b, 3, size, size).
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pkgutil import resolve_name

from pipeline.views import ViewSpec
from sharding.command import UserError
from sharding.manifest import ShardSet


@dataclass(frozen=True)
class PeerOptions:
    shards: ShardSet
    specs: tuple[ViewSpec, ...]  # one per view
    batch_size: int
    num_threads: int  # threads, or worker processes where the peer works with processes
    prefetch: int  # batches that each of them may make ahead

    @property
    def num_ahead(self) -> int:
        """Batches that all of them may have ready when none has been taken for a while: a measurement discards them."""
        return self.num_threads * self.prefetch


Peer = Callable[[], int]  # waits for the next of endless batches, in an order of its own; returns the images in it

# name -> "module:builder", imported when chosen; a builder gets PeerOptions and the stack that ends it
PEERS = {
    "decode-only": "benchmarks.peers.decode:build_cpu",
    "decode-only-dali": "benchmarks.peers.decode:build_dali",
    "decode-only-torchcodec": "benchmarks.peers.decode:build_torchcodec",
    "imagefolder": "benchmarks.peers.imagefolder:build",
    "webdataset": "benchmarks.peers.webdataset:build",
    "grain": "benchmarks.peers.grain:build",
    "dali-native": "benchmarks.peers.dali:build",
    "albumentations": "benchmarks.peers.albumentations:build",
}


def build_peer(name: str, options: PeerOptions, stack: ExitStack) -> Peer:
    """Raises UserError for an unknown name and for shards that no peer can read, and ImportError for one that is not
    installed; the extra has its name."""
    if name not in PEERS:
        raise UserError(f"peer: expected one of {', '.join(PEERS)}, found {name!r}")
    if options.shards.manifest.is_decode_free:
        raise UserError(f"{options.shards.directory}: is decode-free, and {name} reads JPEGs")
    try:
        return resolve_name(PEERS[name])(options, stack)
    except ImportError as error:
        extra = name.removeprefix("decode-only-")
        raise ImportError(f"{error}; it comes with the extra {extra!r}, see pyproject.toml") from error
