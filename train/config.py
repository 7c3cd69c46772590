"""The configuration of a run: defaults, then a YAML file, then ``a.b=c`` overrides, strictly validated."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pipeline.backends import BACKENDS
from pipeline.views import PRESETS, ViewSpec
from sharding.command import UserError
from train.encoder import EncoderConfig
from train.methods import MethodConfig
from train.methods.simclr import SimCLRConfig
from train.optim import OptimConfig


class ConfigError(UserError):
    """A configuration that cannot be run; the message names the field, what was expected and what was found."""


def _expand_preset(value: Any) -> Any:
    if isinstance(value, str):
        if value not in PRESETS:
            raise ValueError(f"expected a list of views or one of {', '.join(PRESETS)}")
        return PRESETS[value]
    return value


class DataConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: str = Field("/data/shards", description="directory or URL made by `python -m sharding.build`")
    backend: Literal["auto", *BACKENDS] = Field(  # type: ignore[valid-type]  # the literal table is the type
        "auto", description="executor of the views; auto: dali on a GPU if its views are cpu's, else cpu"
    )
    canary_every: int = Field(5000, ge=0, description="steps between comparisons of auto's views with cpu's; 0: never")
    num_threads: int = Field(0, ge=0, description="loader threads of each process; 0: the machine's cores, shared out")
    prefetch: int = Field(3, ge=1, description="batches in the making")
    window: int | None = Field(None, ge=1, description="shuffle within this many shards at a time, for slow storage")
    cache_dir: Path | None = Field(None, description="where to keep shards that lie behind a URL")
    cache_bytes: int = Field(200 * 10**9, ge=1, description="limit of cache_dir, which the processes of a node share")
    max_replaced_samples: int = Field(100, ge=0, description="undecodable samples to replace before giving up")


class RunConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    dir: Path = Field(Path("runs/simclr"), description="checkpoints, logs and the effective configuration")
    seed: int = Field(0, ge=0, description="of initial weights, order and views")
    global_batch_size: int = Field(512, ge=2, description="images per step, over all processes")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, fp32 elsewhere")
    sync_batchnorm: bool = Field(True, description="BatchNorm over the global batch")
    compile: bool = Field(False, description="torch.compile the method's forward")
    resume: bool = Field(True, description="continue from the newest checkpoint in dir, if there is one")
    log_every: int = Field(10, ge=1, description="steps between log lines")
    checkpoint_every: int = Field(1000, ge=1, description="steps between checkpoints; the last step always makes one")
    keep_checkpoints: int = Field(3, ge=1, description="newest checkpoints to keep")


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    data: DataConfig = DataConfig()
    views: Annotated[tuple[ViewSpec, ...], BeforeValidator(_expand_preset), Field(min_length=1)] = tuple(
        ViewSpec(**group) for group in PRESETS["simclr"]
    )
    encoder: EncoderConfig = EncoderConfig()
    method: MethodConfig = SimCLRConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The effective configuration. Raises `ConfigError`, naming every wrong field, or the unreadable file."""
    tree = _read_yaml(path) if path else {}
    if isinstance(tree.get("views"), str):
        tree["views"] = _preset_groups(tree["views"])
    for override in overrides:
        _apply(tree, override)
    return validate(tree, str(path) if path else "configuration")


def validate(tree: dict[str, Any], where: str) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(dict(e)) for e in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); pass an existing YAML file to --config"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    return tree


def _preset_groups(name: str) -> Any:
    return [dict(group) for group in PRESETS[name]] if name in PRESETS else name


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` (value in YAML) in place. ``views.size=96`` sets every group, ``views.0.size=96`` one."""
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise ConfigError(f"override {override!r}: expected section.field=value, e.g. optim.epochs=200")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: expected a value in YAML, found {text!r}") from None
    *parents, last = name.split(".")
    if name == "views":
        tree["views"] = _preset_groups(value) if isinstance(value, str) else value
        return
    if parents and parents[0] == "views":
        tree.setdefault("views", _preset_groups("simclr"))
    for node in _descend(tree, parents, override):
        node[last] = value


def _descend(tree: dict[str, Any], parents: Sequence[str], override: str) -> list[dict[str, Any]]:
    nodes: list[Any] = [tree]
    for key in parents:
        if key.isdecimal() and all(isinstance(node, list) and int(key) < len(node) for node in nodes):
            nodes = [node[int(key)] for node in nodes]
        else:
            flat = [item for node in nodes for item in (node if isinstance(node, list) else [node])]
            nodes = [node.setdefault(key, {}) if isinstance(node, dict) else node for node in flat]
    nodes = [item for node in nodes for item in (node if isinstance(node, list) else [node])]
    if not all(isinstance(node, dict) for node in nodes):
        raise ConfigError(f"override {override!r}: {'.'.join(parents)} is not a section of the configuration")
    return nodes


def _explain(error: dict[str, Any]) -> str:
    field = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{field}: unknown{_suggestion(error['loc'])}"
    found = "" if isinstance(error["input"], dict) else f", found {error['input']!r}"  # a section says what it found
    return f"{field}: {error['msg'].removeprefix('Value error, ')}{found}"


def _suggestion(location: tuple[Any, ...]) -> str:
    """The nearest of the names that are allowed where an unknown one was found."""
    model: Any = Config
    for part in location[:-1]:
        model = ViewSpec if isinstance(part, int) else model.model_fields[part].annotation if model is Config else model
    names = list(getattr(model, "model_fields", {}))
    near = difflib.get_close_matches(str(location[-1]), names, n=1)
    near = near or [f"{section}.{location[-1]}" for section in _sections_with(str(location[-1]))]
    return f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(names)}"


def _sections_with(field: str) -> list[str]:
    sections = {name: section.annotation for name, section in Config.model_fields.items()}
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


if __name__ == "__main__":
    print("\n".join(_describe(Config)))
    print("\nof each view (views.size=96 sets all, views.0.size=96 the first):")
    print("\n".join(_describe(ViewSpec, "views.")))
