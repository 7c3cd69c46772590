from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.peers import PEERS, PeerOptions, build_peer
from pipeline.views import ViewSpec, flatten
from sharding.command import UserError
from sharding.manifest import ShardSet
from tests.census import census, wait_until

SPECS = (ViewSpec(count=2, size=32, kernel=5), ViewSpec(size=16, scale=(0.05, 0.3), kernel=3, solarize=0.5))


def options(shards: ShardSet) -> PeerOptions:
    return PeerOptions(shards, flatten(SPECS), batch_size=8, num_threads=1, prefetch=2)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_peer_makes_batches_without_end_and_leaves_nothing(name: str, shard_set: ShardSet) -> None:
    before, files, torch_threads = census(), sorted(shard_set.root.parent.iterdir()), torch.get_num_threads()
    with ExitStack() as stack:
        try:
            peer = build_peer(name, options(shard_set), stack)
        except ImportError as error:
            pytest.skip(str(error))
        assert [peer() for _ in range(14)] == 14 * [8]  # more than a pass over 92 samples
    # Queues' feeder threads end by themselves, and Grain keeps a pool of idle ones for the whole process.
    wait_until(lambda: not {kept for kept in census() - before if name != "grain" or kept.startswith("process")})
    assert sorted(shard_set.root.parent.iterdir()) == files
    assert torch.get_num_threads() == torch_threads


def test_an_unknown_peer_is_refused(shard_set: ShardSet) -> None:
    with pytest.raises(ValueError, match="one of decode-only, decode-only-dali, decode-only-torchcodec, imagefolder"):
        build_peer("magic", options(shard_set), ExitStack())


@pytest.mark.parametrize("name", PEERS)
def test_peers_refuse_decode_free_shards_by_name(name: str, shard_set: ShardSet) -> None:
    manifest = replace(shard_set.manifest, policy={**shard_set.manifest.policy, "decode_free": True})
    with pytest.raises(UserError, match=f"is decode-free, and {name} reads JPEGs"):
        build_peer(name, options(replace(shard_set, manifest=manifest)), ExitStack())


def test_a_peer_that_is_not_installed_is_named_with_its_extra(
    shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PEERS, "absent", "absent.module:build")
    with pytest.raises(ImportError, match=r"No module named 'absent'; it comes with the extra 'absent'"):
        build_peer("absent", options(shard_set), ExitStack())


def test_torchvisions_views_are_normalised_tensors_of_the_specs_sizes() -> None:
    from benchmarks.peers.transforms import MakeViews

    views = MakeViews(flatten(SPECS))(Image.new("L", (60, 50), 128))
    assert [tuple(view.shape) for view in views] == [(3, 32, 32), (3, 32, 32), (3, 16, 16)]
    assert all(view.dtype == torch.float32 and -3 < view.min() < view.max() + 1e-6 < 3 for view in views)


@pytest.mark.parametrize("changes", [{}, {"flip": 1}, {"grey": 1}, {"solarize": 1}], ids=str)
def test_albumentations_views_are_torchvisions_where_nothing_is_drawn(
    changes: dict[str, float], shard_set: ShardSet
) -> None:
    pytest.importorskip("albumentations")
    from benchmarks.peers.albumentations import MakeViews
    from benchmarks.peers.transforms import MakeViews as Reference

    nothing = {"scale": (1, 1), "ratio": (1, 1), "flip": 0, "jitter": 0, "grey": 0, "blur": 0}
    spec = ViewSpec(**{"size": 96, **nothing, **changes})
    y, x = np.mgrid[:96, :96]
    pixels = np.stack([2 * x + 20, 2 * y + 30, 220 - x - y], axis=2).astype(np.uint8)
    [view] = MakeViews(PeerOptions(shard_set, (spec,), batch_size=8, num_threads=1, prefetch=2))(pixels)
    [reference] = Reference([spec])(Image.fromarray(pixels))
    assert (view - reference).abs().mean() < 0.02, "about one level of 255"
