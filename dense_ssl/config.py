"""Typed configuration: one YAML file, dotted overrides, and errors a person can act on.

A run is one YAML that validates to frozen objects. An unknown key stops the run before data or GPU are
touched, with the nearest valid key in the message.
"""

import difflib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from dense_ssl import plain_yaml


class UserError(ValueError):
    """What the user typed or pointed at is wrong; programs print it alone and exit with 2."""


class GaveUp(UserError):
    """Something a run waits for does not answer: nothing is wrong with the input, and trying again may do."""


class Config(BaseModel):
    """Base of every configuration section: frozen, and closed to unknown keys."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=()
    )


ConfigT = TypeVar("ConfigT", bound=Config)


def load(model: type[ConfigT], path: Path, overrides: Iterable[str] = ()) -> ConfigT:
    """Return the validated configuration in `path` with `key.sub=value` overrides applied in order.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown, or a value is out of range.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file")
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping of sections at the top, found {data!r:.60}")
    for override in overrides:
        apply_override(data, override)
    return validate(model, data, str(path))


def read_yaml(path: Path) -> Any:
    """Return the plain data in a YAML file.

    Raises:
        UserError: it cannot be read, is no YAML, or expands to more than any recipe needs.
    """
    try:
        return plain_yaml.parse(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (plain_yaml.NotPlain, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {_first_line(error)}") from None


def validate(model: type[ConfigT], data: Mapping[str, Any], origin: str) -> ConfigT:
    """Return `data` as a `model`; every problem is named by its dotted key."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_explain(model, problem, data) for problem in error.errors()]
        raise UserError(f"{origin}: " + "; ".join(lines)) from None


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one `a.b.0.c=value` in nested mappings and lists; the value is read as YAML.

    A number for a key that holds a schedule moves the schedule's start and keeps its shape:
    `optim.lr=0.1` is still a cosine. A mapping replaces the schedule.
    """
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: write it as key.sub=value")
    try:
        value = plain_yaml.parse(text)
    except plain_yaml.NotPlain as error:
        raise UserError(f"override {override!r}: {_first_line(error)}") from None
    *parents, last = key.split(".")
    node: Any = data
    for part in parents:
        if isinstance(node, list):
            node = node[_position(node, part, key)]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            raise UserError(f"{key}: {part!r} holds {node!r}, which has no keys below it")
    if isinstance(node, list):
        node[_position(node, last, key)] = value
    elif isinstance(node.get(last), dict) and "start" in node[last] and not isinstance(value, dict):
        node[last]["start"] = value
    else:
        node[last] = value


def dump(config: Config) -> str:
    """Return the fully resolved configuration as YAML that `load` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _position(node: list[Any], part: str, key: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise UserError(f"{key}: {part!r} is not a position in a list of {len(node)}")
    return int(part)


def _explain(model: type[BaseModel], problem: Any, data: Any) -> str:
    location = [
        part for part in problem["loc"] if not str(part).startswith(("function-", "tagged-"))
    ]
    location = _as_typed(location, data)
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        near = _nearest(model, location)
        return f"{key}: unknown key" + (f"; did you mean {near}?" if near else "")
    if problem["type"] == "missing":
        return f"{key}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    if not key:  # of several keys together, which the message names
        return message
    shown = repr(problem["input"])
    return f"{key}: {message}" + (f" (got {shown})" if len(shown) <= 60 else "")


def _as_typed(location: list[Any], data: Any) -> list[Any]:
    """Return the keys that were typed: of a union's members, pydantic puts their names in between."""
    typed, node = [], data
    for part in location:
        if isinstance(node, Mapping):
            if part not in node and part in (node.get("name"), node.get("kind")):
                continue
            node = node.get(part)
        elif isinstance(node, list | tuple) and isinstance(part, int):
            node = node[part]
        typed.append(part)
    return typed


def _nearest(model: type[BaseModel], location: list[Any]) -> str | None:
    """Return the dotted key closest to an unknown one, from its own section or from any other."""
    keys = list(_keys(model, ()))
    wanted = ".".join(str(part) for part in location)
    close = difflib.get_close_matches(wanted, keys, n=1, cutoff=0.75)
    if close:
        return close[0]
    tail = [key for key in keys if key.rpartition(".")[2] == str(location[-1])]
    return tail[0] if tail else None


def _keys(annotation: Any, prefix: tuple[str, ...]) -> Iterable[str]:
    """All dotted keys below a model, through optionals, unions and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield ".".join((*prefix, name))
            yield from _keys(field.annotation, (*prefix, name))
    elif get_origin(annotation) in (Union, types.UnionType) or hasattr(annotation, "__metadata__"):
        for part in get_args(annotation):
            yield from _keys(part, prefix)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
