"""What the user says of a configuration: a YAML file and ``a.b=value`` arguments, into one tree of plain values."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.views import PRESETS
from sharding.command import UserError


class ConfigError(UserError):
    """A configuration that cannot be run; the message names the field, what was expected and what was found."""


def read_yaml(path: Path) -> dict[str, Any]:
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


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a tree, by names as overrides have them (``views.0.size``)."""
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        yield prefix[1:], tree
        return
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}.{key}")


def check_length(given: Any, where: str) -> None:
    if isinstance(given, (dict, list)) and {"epochs", "steps"} <= set(given):
        raise ConfigError(f"{where}: expected optim.epochs or optim.steps, found both; remove one of them")


def preset_groups(name: Any) -> Any:
    """The groups of a preset, to be changed one by one; anything else as it is."""
    if not isinstance(name, str):
        return name
    return [dict(group) for group in PRESETS[name]] if name in PRESETS else name


def apply(tree: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` (value in YAML) in place. ``views.size=96`` sets every group, ``views.0.size=96`` one."""
    name, value = parse_override(override)
    *parents, last = name.split(".")
    if name == "views":
        tree["views"] = preset_groups(value)
        return
    for node in _descend(tree, parents, override):
        node[last] = value
        if name in _OTHER_LENGTH:
            node.pop(_OTHER_LENGTH[name], None)


_OTHER_LENGTH = {"optim.epochs": "steps", "optim.steps": "epochs"}  # an override replaces what the file says of either


def parse_override(override: str) -> tuple[str, Any]:
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
