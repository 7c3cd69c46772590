"""Do N processes compute what one would? Measured with the method, views, precision and machines of a run.

    python -m train.verify --config configs/x.yaml data.shards=DIR
    torchrun --standalone --nproc_per_node=8 -m train.verify --config configs/x.yaml data.shards=DIR

docs/verify.md says what each line of its table means, and how to read a FAIL.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.loader import Batch
from sharding.command import UserError, command
from sharding.manifest import open_shards
from train.config import Config, RunConfig, load_config
from train.engine import automatic
from train.engine.plan import RunPlan, check_labels, plan_run
from train.engine.repeat import StepDiffersError, unequal_ranks
from train.methods import Method
from train.pretrain import Pretraining, build, build_loader, optimizer_of, parser, run_facts
from train.processes import fsdp
from train.processes.distributed import World, launch, session

_LEAST_IMAGES = 16
_EXACT = 1e-9  # in float64, whose rounding was 1e-12 at most, over all methods

_STATISTICS, _LOSS, _GRADIENT = "BatchNorm's statistics", "loss", "averaged gradient"
_BUFFERS, _WEIGHTS = "teacher, queue, other buffers after the update", "weights after the update"

Tensors = Mapping[str, torch.Tensor]


class Check(NamedTuple):
    name: str
    status: str  # PASS, FAIL, or MEASURED where nothing exact is claimed
    detail: str
    figures: dict[str, Any]


class Deviation(NamedTuple):
    excess: float  # the norm over its limit, below
    norm: float  # |found - expected| / |expected|, of all tensors together
    limit: float
    cosine: float
    ratio: float  # |found| / |expected|
    worst: float  # of one tensor, relative to its norm, but to a thousandth of that of all at least
    name: str  # of that tensor

    def __str__(self) -> str:
        limit = f" (at most {self.limit:.2g})" if self.limit < math.inf else ""
        figures = f"off by {self.norm:.2g}{limit}, cosine {self.cosine:.9f}, length x {self.ratio:.9f}"
        return f"{figures}, the worst {self.name} by {self.worst:.2g}"


@command("train.verify")
def main(arguments: Sequence[str] | None = None) -> int:
    made = parser(
        "python -m train.verify",
        "Compare N processes with one (gradients, buffers, updates), pieces with the batch, a step with itself.",
        "Alone it starts 2 processes itself; torchrun starts as many as you like. Exit codes: 0 all passed, 1 not.",
    )
    made.add_argument("--images", type=int, help=f"in the global batch (default: at least {_LEAST_IMAGES})")
    made.add_argument("--out", type=Path, help="report to write (default: verify.json in run.dir)")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = made.parse_args(arguments)
    config = load_config(options.config, options.overrides)
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return _launch(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    checks = []
    with session("train.verify") as world:
        for check in verify(config, world, options.images):
            checks.append(check)
            if world.is_main:
                print(f"{check.status:<8}  {check.name}: {check.detail}", flush=True)
        failed = [check.name for check in checks if check.status == "FAIL"]
        if world.is_main:
            path = options.out or config.run.dir / "verify.json"
            _report(path, config, world, checks)
            print(f"FAIL: {', '.join(failed)}" if failed else "PASS", f"(report: {path})")
    return 1 if failed else 0


def verify(config: Config, world: World, images: int | None = None) -> Iterator[Check]:
    """All checks, one after the other, the same on all ranks, which must take them together. Raises UserError for what
    prevents a run as well."""
    shards = open_shards(config.data.shards)
    check_labels(config, shards)
    try:
        world.require_agreement(run_facts(config, shards, 0))
    except UserError as error:
        yield _check("settings, data, code", False, error)
        return
    yield _check("settings, data, code", True, f"the same on {world.size} ranks")
    unit = math.lcm(shards.manifest.num_lanes, 2 * world.size)
    if images and images % unit:
        raise UserError(f"--images: expected a multiple of {unit} (all lanes, two pieces a process), found {images}")
    small = _changed(config, global_batch_size=images or unit * math.ceil(_LEAST_IMAGES / unit))
    exact = _changed(small, precision="fp64") if config.run.precision == "auto" else small
    peak, alone = plan_run(small, shards.manifest.num_samples).peak, World(device=world.device)
    batches = []
    for who, start in ((world, 0), (alone, 0), (world, 1)):
        with build_loader(exact, shards, who, start) as loader:
            batches.append([next(loader), next(loader)])
    own, whole, resumed = batches
    size = len(own[0].ids)
    rows = slice(world.rank * size, (world.rank + 1) * size)
    yield _same("the loader's slices make the batch", world, zip(own, whole, strict=True), rows)
    yield _same("a resumed loader continues", world, [(own[1], resumed[0])])
    dtype = automatic.dtype(small, world)
    try:
        _task(_changed(small, replay_every=1), world, peak)(_cast(own[0], dtype), 0)
        yield _check("a step done twice", True, f"bit for bit on all ranks, in {dtype}")
    except StepDiffersError as error:
        yield _check("a step done twice", False, error)
    yield from _compare(exact, world, peak, own, whole, config.run)


def _check(name: str, passed: bool, detail: object) -> Check:
    return Check(name, "PASS" if passed else "FAIL", str(detail), {})


def _judged(name: str, found: Deviation, why: str = "") -> Check:
    """By its limit; or MEASURED, where ``why`` says why nothing exact is claimed."""
    status = "MEASURED" if why else "PASS" if found.excess <= 1 else "FAIL"
    return Check(name, status, f"{found}; {why}" if why else str(found), found._asdict())


def _changed(config: Config, **run: Any) -> Config:
    """The configuration of a check: undivided, with gradients as long as they are, with some fields of ``run``."""
    plain = {"micro_batch_size": None, "replay_every": 0, "noise_scale": False, "gradient_compression": "none"}
    plain |= {"local_sgd_period": 0, "powersgd_start": 0, "local_sgd_start": 0}
    optim = config.optim.model_copy(update={"clip_norm": None})
    return config.model_copy(update={"run": config.run.model_copy(update=plain | run), "optim": optim})


def _same(name: str, world: World, pairs: Iterable[tuple[Batch, Batch]], rows: slice = slice(None)) -> Check:
    """Whether the first of each pair is ``rows`` of the second."""
    tensors = (([a.ids, a.labels, *a.views], [b.ids, b.labels, *b.views]) for a, b in pairs)
    same = all(torch.equal(x, y[rows]) for a, b in tensors for x, y in zip(a, b, strict=True))
    wrong = [rank for rank, is_same in enumerate(world.gather_objects(same)) if not is_same]
    detail = f"different images or views on ranks {wrong}" if wrong else "every image and view, bit for bit"
    return _check(name, not wrong, detail)


def _compare(
    config: Config, world: World, peak: float, own: list[Batch], whole: list[Batch], run: RunConfig
) -> Iterator[Check]:
    """Two steps of all ranks beside those of one process with the same global batches, from the same weights."""
    alone, eager = World(device=world.device), _changed(config, compile=False, cuda_graphs=False)
    many, one = _task(config, world, peak), _task(eager, alone, peak)
    truth = None if config.run.precision == "fp64" else _task(_changed(eager, precision="fp64"), alone, peak)
    start = state = _in_general_position(one.method)
    has_norm, trains = any(isinstance(m, _BatchNorm) for m in one.method.modules()), config.run.batchnorm == "global"
    found, unequal = dict[str, Deviation](), ""
    least = {_LOSS: torch.finfo(automatic.dtype(config, world)).eps}  # a number, in which rounding may cancel by luck
    for ours, theirs in zip(own, whole, strict=True):
        a, b = _outcome(many, ours, state, trains), _outcome(one, theirs, state, trains)
        exact = _outcome(truth, theirs, state, trains) if truth else b
        for name in b:
            # Two that are each e from float64 are at most 2 e apart; the third e is for roundings that are not alike.
            limit = max(1e-6, least.get(name, 0), 3 * deviation(b[name], exact[name]).norm) if truth else _EXACT
            everyone = world.gather_objects(deviation(a[name], b[name], limit))
            found[name] = max(*everyone, found.get(name, everyone[0]))
        unequal = unequal or unequal_ranks(fsdp.whole(many.method.state_dict()), world)
        state = deepcopy(one.method.state_dict())
    yield from (_judged(name, worst) for name, worst in found.items())
    yield _check("weights on all ranks", not unequal, unequal or "the same, bit for bit")

    def gradient(a: Pretraining, b: Pretraining, batch: Batch, trains: bool, limit: float = math.inf) -> Deviation:
        ours, theirs = (_outcome(*side, start, trains)[_GRADIENT] for side in ((a, own[0]), (b, batch)))
        return max(world.gather_objects(deviation(ours, theirs, limit)))

    size = len(own[0].ids) // 2
    pieces = _task(_changed(config, micro_batch_size=size, cuda_graphs=False, static_graph=False), world, peak)
    kind = f"{_GRADIENT}, {'GradCache' if one.method.images_meet else 'accumulation'} of 2 pieces"
    measured = gradient(pieces, many, own[0], not has_norm, found[_GRADIENT].limit)
    yield _judged(kind + ", BatchNorm in evaluation" * has_norm, measured)
    if has_norm:
        yield _judged(kind, gradient(pieces, many, own[0], True), "BatchNorm's statistics are a piece's")
    if (how := run.gradient_compression) != "none":
        compressed = _task(_changed(config, gradient_compression=how), world, peak)
        yield _judged(_GRADIENT, gradient(compressed, many, own[0], trains), f"sent as {how}")
    if run.local_sgd_period:
        tasks = [_task(_changed(config, local_sgd_period=period), world, peak) for period in (len(own), 0)]
        averaged, expected = (_change(task, own, start) for task in tasks)
        why = f"by post-local SGD, averaged after {len(own)} steps"
        yield _judged("change of the weights", deviation(averaged, expected, math.inf), why)
    if has_norm and not trains:
        yield _judged(_GRADIENT, gradient(many, one, whole[0], True), "BatchNorm's statistics are a rank's")


def _task(config: Config, world: World, peak: float) -> Pretraining:
    method = build(config, world)
    return Pretraining(config, world, RunPlan(4, 0, peak, config.optim), method, optimizer_of(config, method, world))


def _outcome(task: Pretraining, batch: Batch, state: Tensors, trains: bool) -> dict[str, Tensors]:
    """Of an update from ``state``: the loss over all ranks, the gradient, and the state after it, in three parts.
    ``trains``: BatchNorm by the batch, else by its running statistics."""
    method = task.method
    fsdp.load(method, state)
    for module in method.modules():
        if isinstance(module, _BatchNorm):
            module.train(trains)
    named = {name: p for name, p in method.named_parameters() if p.requires_grad}
    gradients = dict[str, torch.Tensor]()

    def keep(*_: Any) -> None:
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()}
        gradients.update(fsdp.whole(found))

    hook = task.optimizer.register_step_pre_hook(keep)
    is_double = next(iter(named.values())).dtype == torch.float64
    loss = task(_cast(batch, torch.float64) if is_double else batch, batch.step).value.item()
    hook.remove()
    if task.step.scaler.get_scale() > 1 and not all(g.isfinite().all() for g in gradients.values()):
        return _outcome(task, batch, state, trains)  # with half the scale
    everyone = torch.tensor(task.world.gather_objects(loss), dtype=torch.float64)
    parts = {_STATISTICS: {}, _LOSS: {"loss": everyone.mean()}, _GRADIENT: gradients, _BUFFERS: {}, _WEIGHTS: {}}
    for name, tensor in deepcopy(fsdp.whole(method.state_dict())).items():
        is_running = name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        parts[_STATISTICS if is_running else _WEIGHTS if name in named else _BUFFERS][name] = tensor
    return {name: tensors for name, tensors in parts.items() if tensors and (trains or name != _STATISTICS)}


def _change(task: Pretraining, batches: list[Batch], start: Tensors) -> Tensors:
    """Of the weights that are trained, by an update with each of the batches."""
    task.method.load_state_dict(dict(start))
    for batch in batches:
        task(_cast(batch, next(task.method.parameters()).dtype), batch.step)
    return {n: p.detach() - start[n] for n, p in task.method.named_parameters() if p.requires_grad}


def deviation(found: Tensors, expected: Tensors, limit: float = _EXACT) -> Deviation:
    """Of tensors with the same names."""
    pairs = {name: (found[name].double().flatten(), b.double().flatten()) for name, b in expected.items()}
    a, b = (torch.cat(tensors) for tensors in zip(*pairs.values(), strict=True))
    size = b.norm().clamp(min=1e-300)
    each = {name: ((x - y).norm() / y.norm().clamp(min=1e-3 * size)).item() for name, (x, y) in pairs.items()}
    norm, cosine, ratio = (v.item() for v in ((a - b).norm() / size, a @ b / (a.norm() * size), a.norm() / size))
    worst = max(each, key=lambda name: each[name])
    return Deviation(norm / limit if math.isfinite(norm) else math.inf, norm, limit, cosine, ratio, each[worst], worst)


def _cast(batch: Batch, dtype: torch.dtype) -> Batch:
    return replace(batch, views=[view.to(dtype) for view in batch.views])


@torch.no_grad()
def _in_general_position(method: Method) -> Tensors:
    """Its state with a tenth of noise on all parameters. At first biases and the ends of residual branches are zero and
    a teacher is a copy; much of the gradient would then be zero, whatever the fault."""
    generator = torch.Generator().manual_seed(0)
    for parameter in method.parameters():
        size = parameter.square().mean().sqrt().item() or 1.0
        parameter.add_((0.1 * size * torch.randn(parameter.shape, generator=generator)).to(parameter))
    return deepcopy(method.state_dict())


def _launch(arguments: Sequence[str]) -> int:
    """Two processes of this command: one has nothing to be compared with."""
    if on_cpu := torch.cuda.device_count() < 2:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    print(f"starting 2 processes here, {'on the CPU over gloo' if on_cpu else 'on GPUs'}; torchrun starts more")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
    return launch([sys.executable, "-m", "train.verify", *arguments], 2)


def _report(path: Path, config: Config, world: World, checks: list[Check]) -> None:
    report: dict[str, Any] = {"passed": all(check.status != "FAIL" for check in checks), "checks": []}
    for check in checks:  # without what JSON cannot say
        figures = {k: v for k, v in check.figures.items() if isinstance(v, str) or math.isfinite(v)}
        report["checks"].append(check._replace(figures=figures)._asdict())
    report |= {"processes": world.size, "device": world.device.type, "torch": torch.__version__}
    report |= {"code": automatic.code_version(), "config": config.model_dump(mode="json")}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
