"""Representations: the same ones by any number of processes, made once, whole or not at all."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.views import ViewSpec, preset
from sharding.manifest import ShardSet, open_shards
from tests.processes import run_ranks
from train.evaluate import features
from train.evaluate.data import Images, evaluation_view
from train.evaluate.features import Features, extract, represent
from train.features import main
from train.model.encoder import Encoder, EncoderConfig
from train.processes.distributed import World

READING: dict[str, Any] = {"num_threads": 1}


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(EncoderConfig(name="resnet18", width=8))


def made(shards: ShardSet, folder: Path, ids: list[int] | None = None) -> Features:
    images = Images(shards, np.arange(92) if ids is None else np.array(ids))
    return extract(encoder(), images, view(shards), folder, World(), **READING)


def view(shards: ShardSet) -> ViewSpec:
    return evaluation_view(preset("simclr", size=32, kernel=5), shards)


def made_by_rank(world: World, shards: str, folder: str) -> list[Any]:
    """By an encoder whose representations depend on what else is in the batch, as rounding may."""
    features._BATCH = 20  # several batches, the last one short
    shard_set, model = open_shards(shards), encoder()
    model.register_forward_hook(lambda _, images, h: h + images[0][0, 0, 0, 0])
    found = extract(model, Images(shard_set, np.arange(92)), view(shard_set), Path(folder), world, **READING)
    views = represent(model, Images(shard_set, np.arange(92)), preset("simclr", size=32, kernel=5), world, READING)
    of_ranks = world.gather_objects(list(views))
    h = torch.cat([h for of_rank in of_ranks for _, h in of_rank], dim=1)
    ids = np.concatenate([ids for of_rank in of_ranks for ids, _ in of_rank])
    return [found.h.clone(), found.ids, found.labels, h, ids.tolist()]


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_make_what_one_makes_to_the_bit(
    shard_set: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    monkeypatch.setattr(features, "_BATCH", 20)
    expected, *_, of_views, _ = made_by_rank(World(), str(shard_set.root), str(tmp_path / "alone"))
    for h, ids, labels, views, ids_of_views in run_ranks(
        made_by_rank, world_size, str(shard_set.root), str(tmp_path / "many")
    ):
        assert torch.equal(h, expected)
        assert torch.equal(views, of_views)
        assert ids.tolist() == ids_of_views == list(range(92))
        assert labels.tolist() == shard_set.index.label.tolist()
    assert [path.is_dir() for path in (tmp_path / "many").iterdir()] == [True], "nothing unfinished is left"


def test_they_are_those_of_the_encoder_in_any_choice_of_images(shard_set: ShardSet, tmp_path: Path) -> None:
    everything, some = made(shard_set, tmp_path), made(shard_set, tmp_path, [3, 17, 44, 45, 90])
    ((h, labels),) = some.tiles(torch.device("cpu"))
    assert torch.equal(h, everything.h[[3, 17, 44, 45, 90]])
    assert labels.tolist() == shard_set.index.label[[3, 17, 44, 45, 90]].tolist()
    mean, std = everything.moments()
    torch.testing.assert_close(mean, everything.h.mean(0))
    torch.testing.assert_close(std, everything.h.std(0, correction=0))


def test_they_are_made_once_and_damaged_ones_again(
    shard_set: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = made(shard_set, tmp_path).h.clone()
    (folder,) = tmp_path.iterdir()
    with monkeypatch.context() as context:
        context.setattr(Encoder, "forward", lambda *_: pytest.fail("made again"))
        made(shard_set, tmp_path)
    for name, position in (("h", 1000), ("meta.json", 0), ("ids-0.npy", 200)):
        content = bytearray((folder / name).read_bytes())
        content[position] ^= 1
        (folder / name).write_bytes(content)
        with caplog.at_level(logging.WARNING):
            again = made(shard_set, tmp_path)
        assert torch.equal(again.h, expected), name
        assert f"{folder}: these features are damaged" in caplog.text
        caplog.clear()


def test_a_different_encoder_or_view_has_its_own(shard_set: ShardSet) -> None:
    base = features.hash_of(encoder(), shard_set, view(shard_set))
    changed = encoder()
    with torch.no_grad():
        changed.backbone.conv1.weight[0, 0, 0, 0] += 1
    assert features.hash_of(changed, shard_set, view(shard_set)) != base
    assert features.hash_of(encoder(), shard_set, preset("eval", size=32)[0]) != base


def test_an_interrupted_extraction_leaves_nothing(
    shard_set: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(Encoder, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made(shard_set, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_images_that_cannot_be_decoded_are_left_out(damage: Callable[[int], ShardSet], tmp_path: Path) -> None:
    shards = damage(91)
    found = made(shards, tmp_path)
    assert found.ids.tolist() == list(range(91))
    assert json.loads(next(tmp_path.glob("*/meta.json")).read_text())["shape"] == [92, 64]


def test_the_command_writes_a_file(tmp_path: Path, shard_set: ShardSet) -> None:
    torch.save({name.removeprefix("backbone."): t for name, t in encoder().state_dict().items()}, tmp_path / "x.pth")
    options = [
        "--checkpoint",
        str(tmp_path / "x.pth"),
        "--shards",
        str(shard_set.root),
        "--out",
        str(tmp_path / "h.npz"),
    ]
    settings = ["encoder=resnet18", "encoder.width=8", "views.size=32", "views.kernel=5", "data.num_threads=1"]
    assert main([*options, *settings]) == 0
    expected = made(shard_set, tmp_path / "own")
    with np.load(tmp_path / "h.npz") as file:
        assert (file["h"] == expected.h.numpy()).all()
        assert file["labels"].tolist() == shard_set.index.label.tolist()
        assert file["ids"].tolist() == list(range(92))
