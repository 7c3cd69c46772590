"""Activation checkpointing (Chen et al., "Training deep nets with sublinear memory cost", 2016): of a block only its
input is kept, and what backward needs of it is computed again then.

Gradients and state are the same to the bit. What a block has beside its weights is put back to where it was in forward:
BatchNorm counts a batch once, and `DropPath` drops the same paths.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from train.model.encoder import DropPath


def blocks(backbone: nn.Module) -> list[nn.Module]:
    """Those of its sequences: a ResNet's layers, a ViT's blocks."""
    sequences = [child for child in backbone.children() if isinstance(child, nn.Sequential | nn.ModuleList)]
    return [block for sequence in sequences for block in sequence]


def compute_again(block: nn.Module) -> None:
    """From now on, in place."""
    options = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": partial(_contexts, block)}
    block.forward = partial(checkpoint, block.forward, **options)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Of forward and of computing it again."""
    return nullcontext(), _again(block, {path: path.calls for path in block.modules() if isinstance(path, DropPath)})


@contextmanager
def _again(block: nn.Module, calls: dict[DropPath, int]) -> Iterator[None]:
    """With copies of buffers, and paths that have been called so often."""
    now = {path: path.calls for path in calls}
    kept = [(module, dict(module.named_buffers(recurse=False))) for module in block.modules()]
    for path, number in calls.items():
        path.calls = number
    for module, buffers in kept:
        for name, buffer in buffers.items():
            setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for path, number in now.items():
            path.calls = number
        for module, buffers in kept:
            for name, buffer in buffers.items():
                setattr(module, name, buffer)
