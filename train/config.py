"""The configuration of a run: defaults, then a YAML file, then ``a.b=c`` overrides, strictly validated."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError, model_validator

from pipeline.backends import BACKENDS
from pipeline.settings import Settings
from pipeline.views import PRESETS, ViewSpec
from sharding.command import UserError
from train.encoder import EncoderConfig
from train.methods import MethodConfig
from train.methods.simclr import SimCLRConfig
from train.optim import OptimConfig


class ConfigError(UserError):
    """A configuration that cannot be run; the message names the field, what was expected and what was found."""


def _expand_preset(value: Any) -> Any:
    if value is None:
        return PRESETS["simclr"]
    if isinstance(value, str) and value in PRESETS:
        return PRESETS[value]
    if not isinstance(value, (list, tuple)):
        raise ValueError(
            f"expected a list of groups or one of {', '.join(PRESETS)}, found {value!r}; "
            "views.size=96, for example, changes every group"
        )
    return value


def _expand_home(path: str) -> str:
    return os.path.expanduser(path)  # noqa: PTH111  # that of Path raises RuntimeError where there is no home


HomeStr = Annotated[str, AfterValidator(_expand_home)]
HomePath = Annotated[Path, AfterValidator(lambda path: Path(_expand_home(str(path))))]


class DataConfig(Settings):
    shards: HomeStr = Field("/data/shards", description="directory or URL made by `python -m sharding.build`")
    backend: Literal["auto", *BACKENDS] = Field(  # type: ignore[valid-type]  # the literal table is the type
        "auto", description="executor of the views; auto: dali on a GPU, cpu elsewhere"
    )
    num_threads: int = Field(
        0, ge=0, le=1024, description="loader threads of each process; 0: the machine's cores, shared out"
    )
    prefetch: int = Field(3, ge=1, le=64, description="batches in the making")
    window: int | None = Field(None, ge=1, description="shuffle within this many shards at a time, for slow storage")
    cache_dir: HomePath | None = Field(None, description="where to keep shards that lie behind a URL")
    cache_bytes: int = Field(200 * 10**9, ge=1, description="limit of cache_dir, which the processes of a node share")
    max_replaced_samples: int = Field(100, ge=0, description="undecodable samples to replace before giving up")


class RunConfig(Settings):
    dir: HomePath = Field(Path("runs/simclr"), description="checkpoints, logs and the effective configuration")
    seed: int = Field(0, ge=0, lt=2**64, description="of initial weights, order and views")
    global_batch_size: int = Field(512, ge=2, description="images per step, over all processes")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, fp32 elsewhere")
    sync_batchnorm: bool = Field(True, description="BatchNorm over the global batch")
    compile: bool = Field(False, description="torch.compile the method's forward")
    resume: bool = Field(True, description="continue from the newest checkpoint in dir, if there is one")
    log_every: int = Field(10, ge=1, description="steps between log lines")
    checkpoint_every: int = Field(1000, ge=1, description="steps between checkpoints; the last step always makes one")
    keep_checkpoints: int = Field(3, ge=1, description="newest checkpoints to keep")


class Config(Settings):
    data: DataConfig = DataConfig()
    views: Annotated[tuple[ViewSpec, ...], BeforeValidator(_expand_preset), Field(min_length=1)] = tuple(
        ViewSpec(**group) for group in PRESETS["simclr"]
    )
    encoder: EncoderConfig = EncoderConfig()
    method: MethodConfig = SimCLRConfig()
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


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The effective configuration of a run. Raises `ConfigError`, naming every wrong field and where it was set, or
    the unreadable file."""
    tree = _read_yaml(path) if path else {}
    if isinstance(tree.get("views"), str):
        tree["views"] = _preset_groups(tree["views"])
    _check_length(tree.get("optim"), str(path))
    _check_length([override.partition("=")[0].removeprefix("optim.") for override in overrides], "overrides")
    for override in overrides:
        _apply(tree, override)
    config = validate(tree, str(path) if path else "configuration", overrides)
    _check_directory(config.run.dir)
    return config


def validate(tree: dict[str, Any], where: str, overrides: Sequence[str] = ()) -> Config:
    """Raises `ConfigError`; a wrong field that an override set is blamed on that override, all others on ``where``."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [f"{_origin(e['loc'] or _OF_ALL, overrides) or where}: {_explain(dict(e))}" for e in error.errors()]
        raise ConfigError("; ".join(lines)) from None


_OF_ALL = ("views",)  # what the check of the whole configuration is about


def _origin(location: tuple[int | str, ...], overrides: Sequence[str]) -> str | None:
    """The last override that set the field, a part of it, or the section that it is in."""
    names = [part for part in location if isinstance(part, str)]
    for override in reversed(overrides):
        key = [part for part in override.partition("=")[0].split(".") if not part.isdecimal()]
        if names[: len(key)] == key[: len(names)]:
            return f"override {override!r}"
    return None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(), _StrictLoader) or {}
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); pass an existing YAML file to --config"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: expected a text file in YAML, found binary data") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    return tree


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error; PyYAML drops the first one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _one_line(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())


def _check_length(given: Any, where: str) -> None:
    if isinstance(given, (dict, list)) and {"epochs", "steps"} <= set(given):
        raise ConfigError(f"{where}: expected optim.epochs or optim.steps, found both; remove one of them")


def _check_directory(path: Path) -> None:
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"run.dir: expected a directory that can be written to, found {nearest} in {path}")


def _preset_groups(name: str) -> Any:
    return [dict(group) for group in PRESETS[name]] if name in PRESETS else name


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` (value in YAML) in place. ``views.size=96`` sets every group, ``views.0.size=96`` one."""
    name, value = _parse_override(override)
    *parents, last = name.split(".")
    if name == "views":
        tree["views"] = _preset_groups(value) if isinstance(value, str) else value
        return
    if parents and parents[0] == "views":
        tree["views"] = tree.get("views") or _preset_groups("simclr")
    for node in _descend(tree, parents, override):
        node[last] = value
        if name in _OTHER_LENGTH:
            node.pop(_OTHER_LENGTH[name], None)


_OTHER_LENGTH = {"optim.epochs": "steps", "optim.steps": "epochs"}  # an override replaces what the file says of either


def _parse_override(override: str) -> tuple[str, Any]:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise ConfigError(f"override {override!r}: expected section.field=value, e.g. optim.epochs=200")
    if not text.strip():
        raise ConfigError(f"override {override!r}: expected a value after '=', found nothing; null means none")
    try:
        value = yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        problem = _one_line(error)
        raise ConfigError(f"override {override!r}: expected a value in YAML, found {text!r} ({problem})") from None
    if " #" in text and text[0] not in "'\"":
        raise ConfigError(f"override {override!r}: ' #' begins a comment in YAML; put the value in quotes of its own")
    return name, value


def _descend(tree: dict[str, Any], parents: Sequence[str], override: str) -> list[dict[str, Any]]:
    """The sections that an override sets a field of: one, or those of all groups of views."""
    nodes: list[Any] = [tree]
    for key in parents:
        if key.isdecimal() and isinstance(nodes[0], list):
            if int(key) >= len(nodes[0]):
                raise ConfigError(f"override {override!r}: expected a group below {len(nodes[0])}, found {key}")
            nodes = [nodes[0][int(key)]]
        else:
            nodes = [_section(node, key) for node in _flat(nodes)]
    nodes = _flat(nodes)
    if not all(isinstance(node, dict) for node in nodes):
        raise ConfigError(f"override {override!r}: {'.'.join(parents)} is not a section of the configuration")
    return nodes


def _flat(nodes: list[Any]) -> list[Any]:
    return [item for node in nodes for item in (node if isinstance(node, list) else [node])]


def _section(node: Any, key: str) -> Any:
    """``node[key]``, made where it is missing or empty; ``encoder: resnet18`` is written out."""
    if not isinstance(node, dict):
        return node
    if node.get(key) is None:
        node[key] = {}
    if isinstance(node[key], str) and key in ("encoder", "method"):
        node[key] = {"name": node[key]}
    return node[key]


def _explain(error: dict[str, Any]) -> str:
    field = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{field}: unknown{_suggestion(error['loc'])}"
    own = error["msg"].removeprefix("Value error, ")
    text = own if own != error["msg"] else f"{own}, found {error['input']!r}"
    return f"{field}: {text}" if field else text


def _suggestion(location: tuple[Any, ...]) -> str:
    """The nearest of the names that are allowed where an unknown one was found."""
    model: Any = Config
    for part in location[:-1]:
        model = ViewSpec if isinstance(part, int) else model.model_fields[part].annotation if model is Config else model
    names = list(getattr(model, "model_fields", {}))
    near = difflib.get_close_matches(str(location[-1]), names, n=1)
    near = near or [name for name in names if "".join(word[0] for word in name.split("_")) == location[-1]]  # lr, wd
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
