"""Typed configs: YAML plus dotted overrides, validated at load, read by attribute.

A config is a frozen type. Unknown keys are errors that name the nearest valid key, so a typo can
never train silently with a default. `${name}` in a value is a top-level key of the same config, or
an environment variable; `${name:-default}` gives a default.
"""

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pilotfish.errors import ConfigError

_REFERENCE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class Config(BaseModel):
    """A frozen settings type that rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


C = TypeVar("C", bound=Config)


def load(config_type: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """Read a YAML file, apply `a.b=value` overrides, resolve references and validate.

    Raises `ConfigError` for an unreadable file, a malformed override, an unknown reference, an
    unknown key or a bad value.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config {str(path)!r} is not a file. Give the path of a YAML file.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"config {str(path)!r} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"config {str(path)!r} holds a {type(tree).__name__}, wanted a mapping.")
    for override in overrides:
        _apply_override(tree, override)
    return parse(config_type, resolve_references(tree), source=str(path))


def parse(config_type: type[C], tree: dict[str, Any], *, source: str) -> C:
    """Validate a mapping; `source` names it in errors. Raises `ConfigError`."""
    try:
        return config_type.model_validate(tree)
    except ValidationError as error:
        lines = [_describe(config_type, item) for item in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from error


def resolve_references(tree: dict[str, Any]) -> dict[str, Any]:
    """Replace `${name}` in every string of the tree; see the module docstring."""
    scope = {key: value for key, value in tree.items() if isinstance(value, str | int | float)}

    def substitute(match: re.Match[str]) -> str:
        name, default = match.groups()
        if name in scope:
            return resolve(str(scope[name]))
        value = os.environ.get(name, default)
        if value is None:
            raise ConfigError(
                f"${{{name}}} is neither a top-level key of the config nor an environment "
                f"variable. Set one, or write ${{{name}:-default}}."
            )
        return value

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: resolve(item) for key, item in value.items()}
        if isinstance(value, list):
            return [resolve(item) for item in value]
        return _REFERENCE.sub(substitute, value) if isinstance(value, str) else value

    try:
        return {key: resolve(value) for key, value in tree.items()}
    except RecursionError:
        raise ConfigError("the config's ${...} references form a circle. Break it.") from None


def dump(config: Config) -> str:
    """Return the resolved config as YAML, keys in declaration order."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value (a.b.c=1).")
    *parents, last = key.split(".")
    node: Any = tree
    for depth, parent in enumerate(parents):
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            at = ".".join(parents[: depth + 1])
            raise ConfigError(f"override {override!r}: {at} is {child!r}, not a section.")
        node = child
    node[last] = yaml.safe_load(text) if text else ""


def _describe(config_type: type[BaseModel], error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        whole = isinstance(error["input"], dict)  # a rule about several keys, which names them
        got = "" if whole or error["type"] == "missing" else f" (got {error['input']!r})"
        message = error["msg"].removeprefix("Value error, ")
        return f"{where}: {message}{got}" if where else f"{message}{got}"
    known = _fields_at(config_type, error["loc"][:-1])
    close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"valid keys: {', '.join(known)}"
    return f"{where}: unknown key; {hint}"


def _fields_at(config_type: type[BaseModel], loc: Sequence[str | int]) -> list[str]:
    """Field names of the config models reachable at an error location."""
    models: list[type[BaseModel]] = [config_type]
    for part in loc:
        annotations = [
            model.model_fields[part].annotation
            for model in models
            if isinstance(part, str) and part in model.model_fields
        ]
        if annotations:  # a list index or the tag of a union names no field: stay where we are
            models = [model for annotation in annotations for model in _models_in(annotation)]
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in get_args(annotation) for model in _models_in(arg)]
