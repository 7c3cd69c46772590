"""A step done twice from the same state, and compared bit for bit on all ranks before anything is updated.

Batches and draws are pure functions of the step. So what differs has a cause that no loss curve shows: a kernel that
adds in any order, a layer that draws from a generator of its own, a faulty device.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch

from sharding.command import UserError
from train.engine.gradcache import Piece, kept
from train.methods import Loss, Method
from train.processes.distributed import World
from train.processes.fsdp import local

Hashes = list[tuple[str, int]]  # of what a step computes: by name, in the order of computation

Backward = Callable[[Piece], tuple[Loss, Any]]  # forward and backward: the loss, and E


class StepDiffersError(UserError):
    """A step that was done twice from the same state computed different values."""


@contextmanager
def undone(method: Method) -> Iterator[None]:
    """Gradients are gone afterwards, and buffers as before."""
    with kept(method.buffers()):
        yield
    method.zero_grad(set_to_none=True)


def done_twice(
    method: Method, backward: Backward, batch: Piece, world: World, look_inside: bool = True
) -> tuple[Loss, Any]:
    """What ``backward`` returns, which is called twice; gradients and state are then as after one call. To
    ``look_inside``, at layers, takes hooks, for which a compiled forward would be compiled anew and in pieces.

    Raises StepDiffersError on every rank if on any of them a layer's output, the loss, a gradient (a rank's own, then
    averaged) or a buffer differs by a bit; it names the rank and what differed first. Also if the averaged gradients
    are not the same on all ranks. Waits for the device.
    """
    where = f"step {batch.draws.step + 1}, done twice from the same state,"
    with undone(method):
        first, _ = _hashed(method, backward, batch, look_inside)
    second, made = _hashed(method, backward, batch, look_inside)
    differ = [(place, (a or b)[0]) for place, (a, b) in enumerate(zip_longest(first, second)) if a != b]
    # All ranks compute in one order, and what differs on one of them soon does on the others.
    if found := [(theirs[0], rank) for rank, theirs in enumerate(world.gather_objects(differ[:1])) if theirs]:
        (_, what), rank = min(found)
        raise StepDiffersError(
            f"{where} computes different values: first {what}, on rank {rank}; no update was made. Either a kernel is "
            "not deterministic (torch.use_deterministic_algorithms(True) names it), or a layer draws from a generator, "
            "or the device is faulty"
        )
    gradients = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    if unequal := unequal_ranks({n: g for n, g in gradients.items() if local(g) is g}, world):  # of shards each its own
        raise StepDiffersError(f"{where} has averaged gradients that are not the same on all ranks: {unequal}")
    return made


def unequal_ranks(tensors: Mapping[str, torch.Tensor], world: World) -> str:
    """Which rank's tensors are not rank 0's, and the first of them; "" where all are equal. Synchronises ranks."""
    everyone = world.gather_objects([entry for item in tensors.items() for entry in _hash(*item)])
    for rank, theirs in enumerate(everyone):
        if names := [name for (name, a), (_, b) in zip(theirs, everyone[0], strict=True) if a != b]:
            return f"rank {rank}'s {names[0]} is not rank 0's ({len(names)} of {len(theirs)} tensors)"
    return ""


def _hashed(method: Method, backward: Backward, batch: Piece, look_inside: bool) -> tuple[Hashes, tuple[Loss, Any]]:
    outputs: Hashes = []
    gradients: Hashes = []

    def note(noted: Hashes, what: str) -> Callable[..., None]:
        return lambda *arguments: noted.extend(_hash(what, arguments[-1]))

    modules = method.named_modules() if look_inside else ()
    layers = [(name or "forward", m) for name, m in modules if m is method or not list(m.children())]
    named = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    handles = [layer.register_forward_hook(note(outputs, f"the output of {name}")) for name, layer in layers]
    handles += [p.register_hook(note(gradients, f"the gradient of {name}")) for name, p in named]
    loss, e = backward(batch)
    for handle in handles:
        handle.remove()
    averaged = [entry for name, p in named for entry in _hash(f"the averaged gradient of {name}", p.grad)]
    buffers = [entry for name, buffer in method.named_buffers() for entry in _hash(f"the buffer {name}", buffer)]
    return [*outputs, *_hash("the loss", loss.value), *gradients, *averaged, *buffers], (loss, e)


def _hash(name: str, value: Any) -> Hashes:
    """Of a tensor, or of those of a tuple: the xor of the bits of its values, which is blind to their order."""
    tensors = value if isinstance(value, tuple) else (value,)
    return [
        (name, int(torch.hash_tensor(t.detach()).view(torch.int64)))
        for t in map(local, tensors)
        if isinstance(t, torch.Tensor) and t.numel()
    ]
