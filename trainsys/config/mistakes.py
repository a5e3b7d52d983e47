"""What pydantic says about a config, turned into lines that a person can act on.

Each line: where it was written (file and line, or the override), the path, what was expected, what
was found, and for a name the nearest right one.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from trainsys.config.text import Path, Tree

_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def explain(error: ValidationError, tree: Tree, schema: type[BaseModel]) -> Iterator[str]:
    """One line for each mistake in ``error``."""
    for item in error.errors(include_url=False):
        path: Path = item["loc"]
        message = _message(item, path, schema)
        where = tree.origin(path or _mentioned(message, tree))
        yield f"{where}: {message}" if where else message


def _message(item: Any, path: Path, schema: type[BaseModel]) -> str:
    dotted = ".".join(map(str, path))
    match item["type"]:
        case "extra_forbidden":
            return f"unknown key {dotted}{_nearest_key(path, schema)}"
        case "missing":
            return f"{dotted} is missing: {expected(schema, path)}"
        case "value_error":
            reason = item["ctx"]["error"]
            return f"{dotted}: {reason}" if dotted else str(reason)
        case _:
            found = item["input"]
            nearest = _nearest_value(schema, path, found)
            # A variable's value may be a secret, also where it is of the wrong kind.
            shown = "another value" if path[:2] == ("launch", "env") else _shown(found)
            return f"{dotted}: expected {expected(schema, path)}, got {shown}{nearest}"


def expected(schema: type[BaseModel], path: Path) -> str:
    """What may stand at ``path``, in words; e.g. ``an integer > 0`` or ``one of none, full``."""
    kind, metadata = _at(schema, path)
    return _words(kind, metadata)


def _mentioned(message: str, tree: Tree) -> Path:
    """The first path that a check over several sections names and that somebody wrote."""
    named = (tuple(dotted.split(".")) for dotted in re.findall(r"\w+(?:\.\w+)+", message))
    return next((path for path in named if path in tree.origins), ())


def _at(schema: type[BaseModel], path: Path) -> tuple[Any, list[Any]]:
    """The annotation and the constraints of what stands at ``path``."""
    kind: Any = schema
    metadata: list[Any] = []
    for step in path:
        model = _model_in(kind)
        if model is not None and step in model.model_fields:
            info: FieldInfo = model.model_fields[str(step)]
            kind, metadata = info.annotation, list(info.metadata)
        elif isinstance(step, int) and get_args(kind):
            items = get_args(kind)
            kind, metadata = items[min(step, len(items) - 1)], []
    return kind, metadata


def _words(kind: Any, metadata: list[Any]) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        inner = [c for note in args[1:] for c in (note.metadata if isinstance(note, FieldInfo) else [note])]
        return _words(args[0], inner + metadata)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(arg, [] if arg is type(None) else metadata) for arg in args)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}" if len(args) > 1 else str(args[0])
    if origin in (list, tuple):
        if origin is tuple and Ellipsis not in args:
            return f"a list of {len(args)}: {', '.join(_words(arg, []) for arg in args)}"
        return f"a list of items that are each {_words(args[0], [])}"
    if origin is dict:
        return "a mapping"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        names = list(kind.model_fields)
        return f"a section with keys such as {', '.join(names[:3])}"
    word = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        SecretStr: "text",
        type(None): "null",
    }
    return word.get(kind, getattr(kind, "__name__", str(kind))) + _bounds(metadata)


def _bounds(metadata: list[Any]) -> str:
    found = [
        f"{sign} {bound}"
        for constraint in metadata
        for name, sign in _BOUNDS.items()
        if (bound := getattr(constraint, name, None)) is not None
    ]
    found += [f"matching {pattern}" for c in metadata if (pattern := getattr(c, "pattern", None))]
    return f" {' and '.join(found)}" if found else ""


def _shown(value: Any) -> str:
    """A found value as YAML would show it, short."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return f"the list {str(value)[:40]}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"the text {value[:40]!r}" if isinstance(value, str) else str(value)


def _nearest_value(schema: type[BaseModel], path: Path, found: Any) -> str:
    kind, _ = _at(schema, path)
    if isinstance(found, str) and kind is bool:
        return "; write true or false"
    choices = [str(arg) for arg in get_args(kind)] if get_origin(kind) is Literal else []
    close = get_close_matches(str(found), choices, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _nearest_key(path: Path, schema: type[BaseModel]) -> str:
    """A sibling of nearly this name, or the place in another section where exactly this key belongs."""
    *parents, key = path
    kind, _ = _at(schema, tuple(parents))
    model = _model_in(kind)
    if key == "include":
        return "; include stands at the top of a file"
    siblings = list(model.model_fields) if model else []
    dotted = {name: ".".join(map(str, (*parents, name))) for name in siblings}
    everywhere = list(_paths(schema, ""))
    elsewhere = [known for known in everywhere if known.rpartition(".")[2] == key]
    close = get_close_matches(str(key), siblings, n=1)
    best = [dotted[name] for name in close] or elsewhere
    if not best:
        leaf = {known.rpartition(".")[2]: known for known in everywhere}
        best = [leaf[name] for name in get_close_matches(str(key), leaf, n=1, cutoff=0.75)]
    if best:
        return f"; did you mean {' or '.join(best[:2])}?"
    return f"; known here: {', '.join(siblings)}" if siblings else ""


def _paths(schema: type[BaseModel], prefix: str) -> Iterator[str]:
    """The dotted path of every field, sections included."""
    for name, info in schema.model_fields.items():
        yield prefix + name
        inner = _model_in(info.annotation)
        if inner is not None:
            yield from _paths(inner, f"{prefix}{name}.")


def _model_in(kind: Any) -> type[BaseModel] | None:
    """The config model in an annotation such as ``MoEConfig | None``."""
    for candidate in (kind, *get_args(kind)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
