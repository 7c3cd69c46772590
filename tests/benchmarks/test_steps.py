"""The steps that ours are held against do the same work: the same loss, and the same weights after an update."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from benchmarks.peers.steps import PlainStep, lightly
from sharding.command import UserError
from sharding.manifest import ShardSet, open_shards
from train.config import Config, load_config
from train.engine.plan import plan_run
from train.pretrain import Pretraining, build, build_loader, optimizer_of
from train.processes.distributed import World

_SMALL = ["views.count=2", "views.size=32", "views.kernel=7", "encoder.name=resnet18", "encoder.width=8"]
_SMALL += ["method.hidden=16", "method.out=8", "data.num_threads=1", "run.global_batch_size=8", "optim.warmup_epochs=0"]
_SMALL += ["optim.schedule=constant", "optim.exclude=[]", "optim.excluded_rate=1", "optim.weight_decay=0.01"]
_WITH_LIGHTLY = pytest.mark.skipif(find_spec("lightly") is None, reason="lightly is not installed")


def config_of(method: str, optimizer: str, shards: ShardSet) -> Config:
    chosen = [f"method.name={method}", f"optim.name={optimizer}", "optim.learning_rate=0.01", "views=simclr"]
    return load_config(None, [*chosen, *_SMALL, f"data.shards={shards.root}"])


def assert_an_update_is_ours(config: Config, theirs: Any, rel: float = 1e-5) -> None:
    with build_loader(config, open_shards(config.data.shards), World(), 0) as loader:
        batch = next(loader)
    own: Any = build(config, World())
    ours = Pretraining(config, World(), plan_run(config, 64), own, optimizer_of(config, own, World()))
    step = PlainStep(config, World(), theirs)
    assert step(batch).item() == pytest.approx(ours(batch, 0).value.item(), rel=rel)
    for name, value in own.encoder.state_dict().items() if rel == 1e-5 else ():
        torch.testing.assert_close(step.method.encoder.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(("method", "optimizer"), [("simclr", "sgd"), ("lejepa", "adamw"), ("byol", "sgd")])
def test_an_update_of_the_plain_loop_is_ours(method: str, optimizer: str, shard_set: ShardSet) -> None:
    assert_an_update_is_ours(config_of(method, optimizer, shard_set), None)


@_WITH_LIGHTLY
@pytest.mark.parametrize("method", ["simclr", "barlow", "vicreg", "simsiam", "byol"])
def test_an_update_by_the_loss_of_lightly_is_ours(method: str, shard_set: ShardSet) -> None:
    assert_an_update_is_ours(config_of(method, "sgd", shard_set), lightly)


@_WITH_LIGHTLY
def test_lejepa_of_lightly_is_ours_but_for_the_slices(shard_set: ShardSet) -> None:
    config = config_of("lejepa", "sgd", shard_set)
    many = config.method.model_copy(update={"slices": 20_000})
    assert_an_update_is_ours(config.model_copy(update={"method": many}), lightly, rel=0.02)


def test_an_optimizer_that_torch_does_not_have_is_refused(shard_set: ShardSet) -> None:
    with pytest.raises(UserError, match="expected sgd or adamw, which torch has, found lars"):
        PlainStep(config_of("simclr", "lars", shard_set), World())


@_WITH_LIGHTLY
def test_a_method_without_a_loss_of_lightly_is_named() -> None:
    with pytest.raises(UserError, match=r"expected one of simclr, .*found mocov2"):
        PlainStep(
            load_config(None, ["method.name=mocov2", "optim.name=sgd", "encoder.name=resnet18"]), World(), lightly
        )
