"""Parameters, gradients and the optimizer's state in shards, one a rank: torch's FSDP2 (`fully_shard`).

An optimizer updates a rank's shards as they are; what is saved is whole, and the same as without shards.
"""

import io
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sharding.command import UserError

State = dict[str, Any]

_SHARDS = "shards"  # the only key of what `write` leaves of a tensor: first row, file, first byte and bytes of each


def shard_parameters(module: nn.Module, blocks: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Shard the parameters over all ranks. ``blocks`` are gathered one at a time, in the ``dtype`` to which autocast
    would cast their weights (but for norms), what is left with the ``module``. Gradients are summed in float32 at
    least. FSDP2 refuses channels_last weights."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing is changed in place
    policy = MixedPrecisionPolicy(dtype, torch.promote_types(dtype, torch.float32), cast_forward_inputs=False)
    for block in blocks:
        if norms := [m for m in block.modules() if "Norm" in type(m).__name__]:  # which have no base class in common
            fully_shard(norms)
        fully_shard(block, mp_policy=policy)
    fully_shard(module)


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard, or the tensor itself where it is none."""
    shard: torch.Tensor = tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor
    return shard


def whole(value: Any) -> Any:
    """A tensor with its shards put together; of a state all of them, on the host. Synchronises ranks."""
    if isinstance(value, Mapping):
        return {key: whole(t).cpu() if isinstance(t, DTensor) else whole(t) for key, t in value.items()}
    return value.full_tensor() if isinstance(value, DTensor) else value


def write(state: State, folder: Path, group: Any) -> State:
    """Every rank's shards into a file of its own in ``folder``, which all see, by torch.distributed.checkpoint. Returns
    the state with the places of its shards in place of them, and in "files" the names of all files. Synchronises ranks.

    Raises OSError on all ranks when a file cannot be written, and UserError for values that are not finite.
    """
    shards, places = dict[str, DTensor](), defaultdict[str, list[Any]](list)

    def noted(value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            return {key: noted(item, f"{name}.{key}".lstrip(".")) for key, item in value.items()}
        if not isinstance(value, DTensor):
            return value
        if value.is_floating_point() and not local(value).isfinite().all():
            raise UserError(f"{folder}: not saved: {name} has values that are not finite; lower the learning rate")
        shards[name] = value
        return {_SHARDS: places[name]}

    left = noted(state, "")
    try:
        saved = dcp.state_dict_saver.save(shards, checkpoint_id=folder, process_group=group)
    except dcp.api.CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise OSError(f"{folder}: rank {rank} could not write its shards ({reason}); free space") from None
    for index, place in saved.storage_data.items():
        places[index.fqn].append((index.offset[0], place.relative_path, place.offset, place.length))
    return left | {"files": [".metadata", *{place.relative_path for place in saved.storage_data.values()}]}


def read(value: Any, folder: Path) -> Any:
    """What `write` returned, but for "files", with whole tensors on the host. Of torch's `.metadata`, a pickle, none is
    read."""
    if not isinstance(value, dict):
        return value
    if value.keys() == {_SHARDS}:
        return torch.cat([_shard(folder / name, *place) for _, name, *place in sorted(value[_SHARDS])])
    return {key: read(item, folder) for key, item in value.items()}


def _shard(path: Path, start: int, length: int) -> torch.Tensor:
    with path.open("rb") as file:
        file.seek(start)
        shard: torch.Tensor = torch.load(io.BytesIO(file.read(length)), weights_only=True)
    return shard


def load(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """``load_state_dict`` of whole tensors, of which each rank takes its shards."""
    own = module.state_dict()
    module.load_state_dict({name: _like(value, own.get(name)) for name, value in state.items()})


def _like(value: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    if not isinstance(own, DTensor) or value.shape != own.shape:
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


class ShardOptimizer(torch.optim.Optimizer):
    """Of parameters in shards: ``optim`` updates those of this rank. Its states are whole ones, for `whole`."""

    optim: Any

    def __init__(self, kind: type[torch.optim.Optimizer], groups: Any, **options: Any) -> None:
        super().__init__(groups, {})
        shards = [{**group, "params": [local(p) for p in group["params"]]} for group in self.param_groups]
        self.optim = kind(shards, **options)
        self.optim.sum_over_ranks = dist.all_reduce  # for LARS
        _settings(self.optim, self)

    def step(self, _: None = None) -> None:  # type: ignore[override]
        _settings(self, self.optim)
        for parameter, own in self._pairs():
            own.grad = None if parameter.grad is None else local(parameter.grad)
        self.optim.step()

    def state_dict(self) -> State:
        state, pairs = self.optim.state_dict(), self._pairs()
        states = {n: {k: _placed(v, *pairs[n]) for k, v in values.items()} for n, values in state["state"].items()}
        return state | {"state": states}

    def load_state_dict(self, state: State) -> None:
        pairs = self._pairs()
        states = {
            n: {k: local(_like(v, pairs[n][0])) for k, v in values.items()} for n, values in state["state"].items()
        }
        self.optim.load_state_dict(state | {"state": states})

    def _pairs(self) -> list[tuple[Any, torch.Tensor]]:
        groups = zip(self.param_groups, self.optim.param_groups, strict=True)
        return [pair for a, b in groups for pair in zip(a["params"], b["params"], strict=True)]


def _placed(value: torch.Tensor, parameter: DTensor, own: torch.Tensor) -> torch.Tensor:
    """What is of the shape of a rank's ``own`` shard as a shard of all."""
    if value.shape != own.shape:
        return value
    shape, mesh, placements = parameter.shape, parameter.device_mesh, parameter.placements
    return DTensor.from_local(value, mesh, placements, shape=shape, stride=parameter.stride())


def _settings(giver: torch.optim.Optimizer, taker: torch.optim.Optimizer) -> None:
    """Those of the groups are handed over."""
    for own, theirs in zip(taker.param_groups, giver.param_groups, strict=True):
        own |= {name: value for name, value in theirs.items() if name != "params"}
