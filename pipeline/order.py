"""Which samples make up a global batch: arithmetic on (counts, seed, step), without state or stored permutations.

The data lies in equal lanes (see `sharding.manifest`); lane ``l`` owns the ids ``[l * n, (l + 1) * n)``. The global
batch is the concatenation of ``B / L`` samples from each lane, so that a rank whose slice covers whole lanes reads
only their shards. Each lane is an infinite stream: pass 0 in one pseudo-random order, pass 1 in another, and so
on; every sample occurs exactly once in a pass.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.random import ORDER_STREAM, REPLACEMENT_STREAM, key_from_seed, permute, philox, to_integer
from sharding.command import UserError
from sharding.manifest import ShardSet

Ids = NDArray[np.int64]


class Order(Protocol):
    """Which samples the batches of a loader have, ``global_batch_size`` of them at most."""

    fate: ClassVar[str]  # of samples that cannot be decoded, for the log

    @property
    def global_batch_size(self) -> int: ...

    @property
    def num_steps(self) -> int | None:
        """How many batches there are; None: no end."""
        ...

    def batch(self, step: int) -> tuple[Ids, Ids]:
        """Sample ids ``(B,)`` of the global batch of ``step`` and the pass ``(B,)`` over the data each belongs to."""
        ...

    def without(self, ids: Ids, epochs: Ids, undecodable: Collection[int]) -> tuple[Ids, Ids]:
        """What takes the place of a part of a batch in which some samples cannot be decoded."""
        ...

    def exhausted(self, undecodable: Collection[int]) -> str:
        """Says why so many undecodable samples leave no place to go on; "" if they do not."""
        ...


@dataclass(frozen=True)
class Sequential:
    """One pass over the samples ``sequence`` (n,), each exactly once on any number of processes; the last batch may be
    short. Samples that cannot be decoded are left out."""

    fate: ClassVar[str] = "left out"

    sequence: Ids
    global_batch_size: int

    @property
    def num_steps(self) -> int:
        """The batches of the pass."""
        return -(-len(self.sequence) // self.global_batch_size)

    def batch(self, step: int) -> tuple[Ids, Ids]:
        """Sample ids (m,) of a batch, and the pass (m,) that they belong to: 0."""
        ids = self.sequence[step * self.global_batch_size : (step + 1) * self.global_batch_size]
        return ids, np.zeros_like(ids)

    def without(self, ids: Ids, epochs: Ids, undecodable: Collection[int]) -> tuple[Ids, Ids]:
        """The batch without them."""
        kept = ~np.isin(ids, list(undecodable))
        return ids[kept], epochs[kept]

    def exhausted(self, undecodable: Collection[int]) -> str:
        """See `Order`."""
        return f"all {len(undecodable)} samples" if np.isin(self.sequence, list(undecodable)).all() else ""


@dataclass(frozen=True)
class Shuffled:
    """The endless shuffled order of a data set of ``L = len(shard_sizes)`` lanes.

    ``shard_sizes[l]`` holds the number of samples of each shard of lane ``l``. ``window`` bounds the shuffle to that
    many shards at a time, so that slow storage is read nearly sequentially; ``None`` is the full permutation.
    """

    fate: ClassVar[str] = "replaced"
    num_steps: ClassVar[None] = None  # there is no end

    shard_sizes: tuple[tuple[int, ...], ...]
    seed: int
    global_batch_size: int
    window: int | None = None

    def __post_init__(self) -> None:
        lanes = len(self.shard_sizes)
        if self.global_batch_size < 1 or self.global_batch_size % lanes:
            raise UserError(
                f"global_batch_size: expected a positive multiple of the {lanes} lanes of the shards, "
                f"found {self.global_batch_size}; change it, or build the shards with other --lanes"
            )
        if self.window is not None and self.window < 1:
            raise UserError(f"window: expected at least one shard, found {self.window}")
        if len({sum(sizes) for sizes in self.shard_sizes}) != 1 or not self.samples_per_lane:
            raise UserError("lanes: expected equally many samples (at least one) in every lane")

    @property
    def samples_per_lane(self) -> int:
        """Samples of each lane; all have equally many."""
        return sum(self.shard_sizes[0])

    @property
    def num_samples(self) -> int:
        """Samples of a pass."""
        return len(self.shard_sizes) * self.samples_per_lane

    def without(self, ids: Ids, epochs: Ids, undecodable: Collection[int]) -> tuple[Ids, Ids]:
        """Each undecodable id exchanged for one of its lane drawn by (seed, epoch, id, attempt)."""
        replaced = ids.copy()
        for row in np.flatnonzero(np.isin(ids, list(undecodable))):
            attempt = 0
            while int(replaced[row]) in undecodable:
                replaced[row] = self._replacement(int(ids[row]), int(epochs[row]), attempt)
                attempt += 1
        return replaced, epochs

    def exhausted(self, undecodable: Collection[int]) -> str:
        """See `Order`."""
        lane, count = Counter(sample // self.samples_per_lane for sample in undecodable).most_common(1)[0]
        return f"all {count} samples of lane {lane}" if count == self.samples_per_lane else ""

    def _replacement(self, sample: int, epoch: int, attempt: int) -> int:
        words = philox(key_from_seed(self.seed), epoch, sample, REPLACEMENT_STREAM, attempt)
        per_lane = self.samples_per_lane
        return sample // per_lane * per_lane + int(to_integer(words[..., 0], per_lane))

    def batch(self, step: int) -> tuple[Ids, Ids]:
        """Sample ids ``(B,)`` of the global batch of ``step`` and the pass ``(B,)`` over the data each belongs to."""
        lanes = len(self.shard_sizes)
        per_lane = self.global_batch_size // lanes
        positions = step * per_lane + np.arange(per_lane, dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.samples_per_lane)
        ids = [lane * self.samples_per_lane + self._shuffled(lane, epochs, offsets) for lane in range(lanes)]
        return np.concatenate(ids), np.tile(epochs, lanes)

    def _shuffled(self, lane: int, epochs: Ids, offsets: Ids) -> Ids:
        shuffled = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            shuffled[chosen] = self._shuffled_in_epoch(lane, int(epoch), offsets[chosen])
        return shuffled

    def _shuffled_in_epoch(self, lane: int, epoch: int, offsets: Ids) -> Ids:
        key = key_from_seed(self.seed)
        if self.window is None:
            return permute(offsets, self.samples_per_lane, key, ORDER_STREAM + lane, epoch)
        sizes = np.array(self.shard_sizes[lane])
        shards = permute(np.arange(len(sizes)), len(sizes), key, ORDER_STREAM + lane, epoch)
        ends = np.cumsum(np.add.reduceat(sizes[shards], np.arange(0, len(shards), self.window)))
        shuffled = np.empty_like(offsets)
        chosen = np.searchsorted(ends, offsets, side="right")
        for w in np.unique(chosen):
            members = _members(sizes, shards[w * self.window :][: self.window])
            inside = chosen == w
            positions = offsets[inside] - (ends[w] - len(members))
            # The lanes' own permutations use streams 0 to L - 1, their windows those above.
            stream = ORDER_STREAM + len(self.shard_sizes) * (int(w) + 1) + lane
            shuffled[inside] = members[permute(positions, len(members), key, stream, epoch)]
        return shuffled


@dataclass(frozen=True)
class ShuffledPart:
    """The endless shuffled order of some samples, ``chosen`` (n,) in rising order, wherever they lie; every one of them
    occurs exactly once in a pass. Undecodable ones are replaced by others of them."""

    fate: ClassVar[str] = "replaced"
    num_steps: ClassVar[None] = None

    chosen: Ids
    seed: int
    global_batch_size: int

    @property
    def _places(self) -> Shuffled:
        """The order of their places in ``chosen``: one lane of one shard."""
        return Shuffled(((len(self.chosen),),), self.seed, self.global_batch_size)

    def batch(self, step: int) -> tuple[Ids, Ids]:
        """See `Order`."""
        places, epochs = self._places.batch(step)
        return self.chosen[places], epochs

    def without(self, ids: Ids, epochs: Ids, undecodable: Collection[int]) -> tuple[Ids, Ids]:
        """Each undecodable id exchanged for a different one that is chosen."""
        places, bad = (np.searchsorted(self.chosen, list(samples)) for samples in (ids, undecodable))
        replaced, _ = self._places.without(places, epochs, set(bad.tolist()))
        return self.chosen[replaced], epochs

    def exhausted(self, undecodable: Collection[int]) -> str:
        """See `Order`."""
        count = len(undecodable)
        return f"all {count} samples that were chosen" if count == len(self.chosen) else ""


def lane_shard_sizes(shards: ShardSet) -> tuple[tuple[int, ...], ...]:
    """Samples of each shard, by lane."""
    manifest = shards.manifest
    return tuple(
        tuple(shard.num_samples for shard in manifest.shards if shard.lane == lane)
        for lane in range(manifest.num_lanes)
    )


def lanes_of_rank(num_lanes: int, rank: int, world_size: int) -> range:
    """The lanes that a rank's slice of a global batch overlaps. It reads no others, replacements included."""
    return range(rank * num_lanes // world_size, -(-(rank + 1) * num_lanes // world_size))


def _members(sizes: Ids, shards: Ids) -> Ids:
    """The offsets within the lane of all samples of the given shards."""
    ends = np.cumsum(sizes)
    return np.concatenate([np.arange(ends[s] - sizes[s], ends[s]) for s in shards])
