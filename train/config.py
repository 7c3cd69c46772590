"""The configuration of a run: defaults, then a YAML file, then ``a.b=c`` overrides, strictly validated."""

import copy
import difflib
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, create_model, model_validator

from pipeline.backends import BACKENDS
from pipeline.settings import Settings, problem
from pipeline.views import PRESETS, ViewSpec
from train.methods import METHODS, MethodConfig, method_class
from train.model.encoder import EncoderConfig
from train.optim.optimizers import OptimConfig
from train.overrides import ConfigError, apply, check_length, preset_groups, read_yaml
from train.processes.communication import Over, ParallelConfig

_DEFAULT_METHOD = "simclr"


def _are_groups(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ValueError(
            f"expected a list of groups or one of {', '.join(PRESETS)}, found {value!r}; "
            "views.size=96, for example, changes every group"
        )
    return value


# That of Path raises RuntimeError where there is no home.
HomeStr = Annotated[str, AfterValidator(os.path.expanduser)]
HomePath = Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))]  # noqa: PTH111


class DataConfig(Settings):
    shards: HomeStr = Field("/data/shards", description="directory or URL made by `python -m sharding.build`")
    backend: Literal["auto", *BACKENDS] = Field(  # type: ignore[valid-type]  # the literal table is the type
        "auto", description="executor of the views; auto: dali on a GPU if its views are cpu's, else cpu"
    )
    canary_every: int = Field(5000, ge=0, description="steps between comparisons of auto's views with cpu's; 0: never")
    num_threads: int = Field(
        0, ge=0, le=1024, description="loader threads of each process; 0: the machine's cores, shared out"
    )
    prefetch: int = Field(3, ge=1, le=64, description="batches in the making")
    window: int | None = Field(None, ge=1, description="shuffle within this many shards at a time, for slow storage")
    cache_dir: HomePath | None = Field(None, description="where to keep shards that lie behind a URL")
    cache_bytes: int = Field(200 * 10**9, ge=1, description="limit of cache_dir, which the processes of a node share")
    max_replaced_samples: int = Field(100, ge=0, description="undecodable samples to replace before giving up")


# A field, its value (None: any but 0), and fields that it does not go together with.
_APART = (
    ("parallel", "fsdp", "gradient_compression local_sgd_period shard_optimizer static_graph noise_scale compile"),
    ("local_sgd_period", None, "gradient_compression shard_optimizer noise_scale replay_every"),
    ("gradient_compression", "powersgd", "static_graph replay_every noise_scale"),
    ("precision", "fp16", "noise_scale local_sgd_period parallel"),
    ("static_graph", None, "micro_batch_size"),
    ("activation_checkpointing", None, "compile"),
    ("cuda_graphs", None, "parallel activation_checkpointing micro_batch_size"),  # a piece would overwrite the last one
)


class RunConfig(ParallelConfig):
    dir: HomePath = Field(Path("runs/simclr"), description="checkpoints, logs and the effective configuration")
    seed: int = Field(0, ge=0, lt=2**64, description="of initial weights, order and views")
    global_batch_size: int = Field(512, ge=2, description="images per step, over all processes")
    micro_batch_size: int | None = Field(
        None, ge=1, description="images of a process that pass the network at a time, to save memory; default: all"
    )
    activation_checkpointing: bool = Field(
        False, description="compute an encoder's activations again in backward: less memory, one more forward"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = Field(
        "auto", description="auto: bf16 on a GPU, fp32 elsewhere; fp16: with a scaled loss; fp64: on a CPU, to verify"
    )
    batchnorm: Over = Field(
        "global", description="statistics over the images of all processes, of one (local), of a node, or of so many"
    )
    noise_scale: bool = Field(False, description="log the gradient noise scale and the critical batch size")
    compile: bool = Field(False, description="torch.compile the method's forward")
    cuda_graphs: bool = Field(False, description="compile it, and replay as CUDA graphs what no draw of a step is in")
    init_from: HomePath | None = Field(
        None, description="begin with an encoder's weights: a run, one of its checkpoints, or a torch file of them"
    )
    replay_every: int = Field(
        0, ge=0, description="steps between steps that are done twice and must agree bit for bit; 0: none"
    )
    resume: bool = Field(True, description="continue from the newest checkpoint in dir, if there is one")
    online: bool = Field(True, description="log a linear probe and kNN where there are labels; training is the same")
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        ("tensorboard",), description="where records go beside metrics.jsonl"
    )
    log_every: int = Field(10, ge=1, description="steps between log lines")
    checkpoint_every: int = Field(1000, ge=1, description="steps between checkpoints; the last step always makes one")
    keep_checkpoints: int = Field(3, ge=1, description="newest checkpoints to keep")
    keep_every: int | None = Field(None, ge=1, description="keep the checkpoints of every so many steps for ever")

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        """Refuses what does not go together."""
        if self.sharded_checkpoints and self.parallel != "fsdp":
            raise ValueError(f"sharded_checkpoints: expected parallel=fsdp, found {self.parallel}; set one of them")
        for name, value, others in _APART:
            chosen = getattr(self, name)
            wrong = [o for o in others.split() if getattr(self, o) != type(self).model_fields[o].default]
            if wrong and (chosen == value if value else chosen):
                raise ValueError(f"{wrong[0]}: expected its default with {name}={chosen}; set one of them back")
        return self

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, value: Any) -> Any:
        """``sync_batchnorm: true`` is ``batchnorm: global``, as it was called before."""
        if not isinstance(value, dict) or "sync_batchnorm" not in value:
            return value
        if "batchnorm" in value:
            raise ValueError("expected batchnorm, found also sync_batchnorm, its name of before; remove that one")
        over = "global" if value["sync_batchnorm"] else "local"
        return {k: v for k, v in value.items() if k != "sync_batchnorm"} | {"batchnorm": over}


class Config(Settings):
    """All sections. Which fields ``method`` has depends on its name: see `config_class`."""

    data: DataConfig = DataConfig()
    views: Annotated[tuple[ViewSpec, ...], BeforeValidator(_are_groups), Field(min_length=1)] = tuple(
        ViewSpec(**group) for group in PRESETS["simclr"]
    )
    encoder: EncoderConfig = EncoderConfig()
    method: MethodConfig = Field(default_factory=lambda: method_class(_DEFAULT_METHOD).Config())
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _check(self) -> "Config":
        count = sum(group.count for group in self.views)
        if count < self.method.min_views:
            raise ValueError(
                f"views: expected at least {self.method.min_views} views of each image for {self.method.name}, "
                f"found {count}; set views.count={self.method.min_views}, for example"
            )
        sizes = [group.size for group in self.views for _ in range(group.count)]
        if sizes[: (least := self.method.min_global)] != least * [max(sizes)]:
            raise ValueError(
                f"views: expected at least {least} of the largest size, {max(sizes)} px, to come first for "
                f"{self.method.name}, found views of {', '.join(map(str, sizes))} px; put the group of the large ones "
                f"first, with a count of {least} or more"
            )
        return self

    def to_yaml(self) -> str:
        """All of it, as `load_config` reads it."""
        tree = self.model_dump(mode="json")
        del tree["optim"]["steps" if self.optim.steps is None else "epochs"]
        return yaml.safe_dump(tree, sort_keys=False)

    def differences(self) -> str:
        """What is not as by default, in YAML; empty where everything is."""
        tree = self.model_dump(mode="json", exclude_defaults=True)
        return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None) if tree else ""


@cache
def config_class(method: str) -> type[Config]:
    """`Config` with the section of one method. Raises ConfigError for an unknown one."""
    if method not in METHODS:
        near = difflib.get_close_matches(str(method), METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(METHODS)}"
        raise ConfigError(f"method.name: unknown method {method!r}; {hint}")
    section = method_class(method).Config
    return create_model("Config", __base__=Config, method=(section, section()))


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The effective configuration of a run: the defaults, the recipe of its method, the file, the overrides.

    Raises `ConfigError`, naming every wrong field and where it was set, or the unreadable file.
    """
    tree = read_yaml(path) if path else {}
    check_length(tree.get("optim"), str(path))
    check_length([override.partition("=")[0].removeprefix("optim.") for override in overrides], "overrides")
    tree = _with_recipe(tree, _method_name(tree, overrides))
    for override in overrides:
        apply(tree, override)
    config = validate(tree, str(path) if path else "configuration", overrides)
    _check_directory(config.run.dir)
    return config


def validate(tree: dict[str, Any], where: str, overrides: Sequence[str] = ()) -> Config:
    """Raises `ConfigError`; a wrong field that an override set is blamed on that override, all others on ``where``."""
    model = config_class(_method_name(tree))
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = [
            f"{_origin(e['loc'] or _OF_ALL, overrides) or where}: {_explain(dict(e), model)}" for e in error.errors()
        ]
        raise ConfigError("; ".join(lines)) from None


def _method_name(tree: dict[str, Any], overrides: Sequence[str] = ()) -> str:
    """As the last override has it, or the file, or by default."""
    scratch = {"method": copy.deepcopy(tree.get("method"))}
    for override in overrides:
        if override.startswith(("method=", "method.name=")):
            apply(scratch, override)
    method = scratch["method"]
    name = method.get("name") if isinstance(method, dict) else method
    return name if isinstance(name, str) else _DEFAULT_METHOD


def _with_recipe(tree: dict[str, Any], method: str) -> dict[str, Any]:
    """The tree on top of what the method's recipe says."""
    config_class(method)
    recipe = method_class(method).recipe
    merged = {**tree, "views": preset_groups(tree.get("views") or recipe.views)}
    for section, fields in recipe.sections.items():
        given = tree.get(section) or {}
        if isinstance(given, dict):
            length = ("epochs",) if "steps" in given else ()
            merged[section] = {k: v for k, v in fields.items() if k not in length} | given
    return merged


_OF_ALL = ("views",)  # what the check of the whole configuration is about


def _origin(location: tuple[int | str, ...], overrides: Sequence[str]) -> str | None:
    """The last override that set the field, a part of it, or the section that it is in."""
    names = [part for part in location if isinstance(part, str)]
    for override in reversed(overrides):
        key = [part for part in override.partition("=")[0].split(".") if not part.isdecimal()]
        if names[: len(key)] == key[: len(names)]:
            return f"override {override!r}"
    return None


def _check_directory(path: Path) -> None:
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"run.dir: expected a directory that can be written to, found {nearest} in {path}")


def _explain(error: dict[str, Any], model: type[Config]) -> str:
    field = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{field}: unknown{_suggestion(error['loc'], model)}"
    return f"{field}: {problem(error)}" if field else problem(error)


def _suggestion(location: tuple[Any, ...], config: type[Config]) -> str:
    """The nearest of the names that are allowed where an unknown one was found, or where it belongs."""
    *parents, unknown = location
    model: Any = config
    if parents:
        model = ViewSpec if parents[0] == "views" else config.model_fields[parents[0]].annotation
    names = list(getattr(model, "model_fields", {}))
    methods = [name for name in METHODS if unknown in method_class(name).Config.model_fields]
    if methods and parents == ["method"]:
        chosen = config.model_fields["method"].default.name
        return f"; it belongs to {' and '.join(methods)}, and method.name is {chosen}"
    if near := difflib.get_close_matches(str(unknown), names, n=1) or _abbreviated(str(unknown), names):
        return f"; did you mean {near[0]!r}?"
    if elsewhere := _sections_with(str(unknown), config):
        return f"; did you mean '{elsewhere[0]}.{unknown}'?"
    return f"; expected one of {', '.join(names)}"


def _abbreviated(short: str, names: list[str]) -> list[str]:
    """``lr`` is learning_rate."""
    return [name for name in names if "".join(word[0] for word in name.split("_")) == short]


def _sections_with(field: str, config: type[Config]) -> list[str]:
    sections = {name: section.annotation for name, section in config.model_fields.items()}
    return [name for name, model in sections.items() if field in getattr(model, "model_fields", {})]


def _describe(model: type[BaseModel], prefix: str = "") -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            lines += _describe(kind, f"{prefix}{name}.")
        else:
            default = "simclr" if name == "views" else field.default
            lines.append(f"{prefix + name + '=' + str(default):<44} {field.description or ''}".rstrip())
    return lines


def describe() -> str:
    """Every setting with its default and its meaning, as text."""
    lines = _describe(config_class(_DEFAULT_METHOD))
    lines += ["", "of each view (views.size=96 sets all, views.0.size=96 the first):", *_describe(ViewSpec, "views.")]
    for name in METHODS:
        method = method_class(name)
        recipe = yaml.safe_dump(method.recipe.sections, default_flow_style=True, width=1000).strip()
        lines += ["", f"method.name={name}, with views={method.recipe.views} and {recipe} by default:"]
        lines += _describe(method.Config, "method.")
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe())
