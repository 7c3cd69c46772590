from collections.abc import Iterator

import fsspec
import pytest

from sharding.manifest import ShardSet, open_shards


@pytest.fixture
def remote(shard_set: ShardSet) -> Iterator[ShardSet]:
    """The shards in fsspec's memory, as good as an object store: whole files by name, no memory map."""
    memory = fsspec.filesystem("memory")
    memory.put(str(shard_set.root), "/data/shards", recursive=True)
    yield open_shards("memory://data/shards")
    memory.rm("/data", recursive=True)
