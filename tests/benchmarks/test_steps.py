"""The steps that ours are held against do the same work: the same loss, and the same weights after an update."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from benchmarks.peers.steps import LOSSES, METHODS, PlainStep, plain
from pipeline.loader import Batch
from sharding.command import UserError
from sharding.manifest import ShardSet, open_shards
from train.config import Config, load_config
from train.engine.plan import plan_run
from train.pretrain import Pretraining, build, build_loader, optimizer_of
from train.processes.distributed import World

_SMALL = ["views.count=2", "views.size=32", "views.kernel=7", "encoder.name=resnet18", "encoder.width=8"]
_SMALL += ["method.hidden=16", "method.out=8", "data.num_threads=1", "run.global_batch_size=8", "optim.warmup_epochs=0"]
_SMALL += ["optim.schedule=constant", "optim.exclude=[]", "optim.excluded_rate=1", "optim.weight_decay=0.01"]


def config_of(method: str, optimizer: str, shards: ShardSet) -> Config:
    chosen = [f"method.name={method}", f"optim.name={optimizer}", "optim.learning_rate=0.01", "views=simclr"]
    return load_config(None, [*chosen, *_SMALL, f"data.shards={shards.root}"])


def first_batch(config: Config) -> Batch:
    with build_loader(config, open_shards(config.data.shards), World(), 0) as loader:
        return next(loader)


_WITHOUT_LIGHTLY = pytest.mark.skipif(find_spec("lightly") is None, reason="lightly is not installed")
SOURCES = ["plain", pytest.param("lightly", marks=_WITHOUT_LIGHTLY)]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "lejepa"])
def test_an_update_is_ours(method: str, source: str, shard_set: ShardSet) -> None:
    config = config_of(method, "sgd", shard_set)
    batch, world = first_batch(config), World()
    own: Any = build(config, world)
    ours = Pretraining(config, world, plan_run(config, 64), own, optimizer_of(config, own, world))
    step = PlainStep(config, LOSSES[source], world)
    assert step(batch.views).item() == pytest.approx(ours(batch, 0).value.item(), rel=1e-5)
    for name, value in own.encoder.state_dict().items():
        torch.testing.assert_close(step.method.encoder.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("source", SOURCES)
def test_lejepa_is_ours_but_for_the_slices(source: str, shard_set: ShardSet) -> None:
    config = config_of("lejepa", "adamw", shard_set)
    config = config.model_copy(update={"method": config.method.model_copy(update={"slices": 20_000})})
    batch, world = first_batch(config), World()
    own: Any = build(config, world)
    ours = Pretraining(config, world, plan_run(config, 64), own, optimizer_of(config, own, world))
    assert PlainStep(config, LOSSES[source], world)(batch.views).item() == pytest.approx(
        ours(batch, 0).value.item(), rel=0.02
    )


def test_the_teacher_follows_as_ours_does(shard_set: ShardSet) -> None:
    config = config_of("byol", "sgd", shard_set)
    step = PlainStep(config, plain, World())
    before = [p.clone() for p in step.method.teacher_encoder.parameters()]
    step(first_batch(config).views)
    students = step.method.encoder.parameters()
    for old, new, student in zip(before, step.method.teacher_encoder.parameters(), students, strict=True):
        torch.testing.assert_close(new, 0.996 * old + 0.004 * student, rtol=1e-5, atol=1e-7)


def test_what_it_cannot_do_is_refused(shard_set: ShardSet) -> None:
    with pytest.raises(UserError, match="expected sgd or adamw, which torch has, found lars"):
        PlainStep(config_of("simclr", "lars", shard_set), plain, World())
    with pytest.raises(UserError, match=r"expected one of simclr, .*found dino"):
        PlainStep(load_config(None, ["method.name=dino", "optim.name=sgd"]), plain, World())
