"""Parameters in shards: how they are gathered."""

from dataclasses import replace

import torch
from torch import nn

from tests.processes import run_ranks
from tests.train.model.test_checkpointing import batch_of, task_of
from train.processes.distributed import World
from train.processes.fsdp import whole

Update = tuple[dict[str, str], dict[str, torch.Tensor]]


def update(world: World, *more: str) -> Update:
    """In bf16: the dtype in which each block's weights are used, by kind of layer, and the averaged gradients."""
    config, task = task_of("mae", world, "run.precision=bf16", *more)
    dtypes, gradients = dict[str, str](), dict[str, torch.Tensor]()

    def note(layer: nn.Module, *_: object) -> None:
        dtypes[type(layer).__name__.removeprefix("FSDP")] = str(layer.weight.dtype)

    def keep(*_: object) -> None:
        gradients.update(whole({n: p.grad for n, p in task.method.named_parameters() if p.grad is not None}))

    block = task.method.encoder.backbone.get_submodule("blocks.0")
    for layer in (block.get_submodule("norm1"), block.get_submodule("attn.qkv")):
        layer.register_forward_hook(note)
    task.optimizer.register_step_pre_hook(keep)
    batch = batch_of(config, world, 0)
    task(replace(batch, views=[view.bfloat16() for view in batch.views]), 0)
    return dtypes, {name: gradient.clone() for name, gradient in gradients.items()}


def both(world: World) -> list[Update]:
    return [update(world), update(world, "run.parallel=fsdp")]


def test_blocks_are_gathered_in_bf16_but_for_norms_and_no_bit_of_a_gradient_changes() -> None:
    for (_, expected), (dtypes, found) in run_ranks(both, 2):
        assert dtypes == {"LayerNorm": "torch.float32", "Linear": "torch.bfloat16"}
        assert expected.keys() == found.keys()
        assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []
