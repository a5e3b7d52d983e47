"""YAML text to plain values that remember where they were written, and back.

PyYAML's own reading surprises: ``1e-4`` is a string, ``off`` is false, a key given twice silently
keeps the last. Here scalars follow the YAML 1.2 core schema, and a repeated key is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml

from trainsys.errors import UserError

Path = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+"),
    "float": re.compile(
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}


@dataclass
class Tree:
    """Nested plain values, and for each path in them where it was written (``file:line``, or an override)."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Path, str] = field(default_factory=dict)

    def origin(self, path: Path) -> str:
        """Where ``path`` was written, or the nearest enclosing section that was."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, "")


def parse_scalar(text: str, source: str) -> Any:
    """The value of a plain (unquoted) YAML 1.2 scalar: ``1e-4`` a float, ``off`` a string."""
    text = text.strip()
    kind = next((name for name, pattern in _SCALARS.items() if pattern.fullmatch(text)), "str")
    return _as(kind, text, source)


def parse_document(text: str, source: str) -> tuple[Any, dict[Path, str]]:
    """One YAML document as plain values, and the origin of each path.

    Raises UserError for text that is not one YAML document, a repeated key, a key that is no string,
    a tag outside the core schema, and an alias that contains itself.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{source}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    if node is None:
        return None, {}
    reader = _Reader(source)
    try:
        return reader.value(node, ()), reader.origins
    except RecursionError:
        raise UserError(f"{source}: nested too deeply") from None


class _Reader:
    """Turns PyYAML's nodes into values; keeps the line of each path."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.origins: dict[Path, str] = {}
        self._open: list[int] = []

    def value(self, node: yaml.Node, path: Path) -> Any:
        where = f"{self.source}:{node.start_mark.line + 1}"
        self.origins.setdefault(path, where)
        if id(node) in self._open:
            raise UserError(f"{where}: an alias refers to what it is part of")
        self._open.append(id(node))
        try:
            return self._value(node, path, where)
        finally:
            self._open.pop()

    def _value(self, node: yaml.Node, path: Path, where: str) -> Any:
        match node.tag.removeprefix(_TAG):
            case "map" if isinstance(node, yaml.MappingNode):
                return dict(self._items(node, path))
            case "seq" if isinstance(node, yaml.SequenceNode):
                return [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
            case kind if isinstance(node, yaml.ScalarNode):
                return _as(kind, node.value, where)
            case kind:
                raise UserError(f"{where}: tag {kind!r} is not supported; write a plain mapping or list")

    def _items(self, node: yaml.MappingNode, path: Path) -> Iterator[tuple[str, Any]]:
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{self.source}:{line}: a key must be a word, not a list or a mapping")
            key = key_node.value
            if key in lines:
                dotted = ".".join(map(str, (*path, key)))
                raise UserError(f"{self.source}:{line}: key {dotted} is already given on line {lines[key]}")
            lines[key] = line
            self.origins[*path, key] = f"{self.source}:{line}"
            yield key, self.value(value_node, (*path, key))


def dump(values: Any) -> str:
    """Block-style YAML that `parse_document` reads back to the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _as(kind: str, text: str, where: str) -> Any:
    try:
        match kind:
            case "null":
                return None
            case "bool":
                return {"true": True, "false": False}[text.lower()]
            case "int":
                return int(text.replace("_", ""), {"0x": 16, "0o": 8}.get(text[:2], 10))
            case "float":
                return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
            case "str":
                return text
    except (ValueError, KeyError):
        raise UserError(f"{where}: {text[:40]!r} is no {kind}") from None
    raise UserError(f"{where}: tag {kind!r} is not supported; write the plain value")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's parser without its YAML 1.1 guesses; C where PyYAML was built with it."""

    yaml_implicit_resolvers: ClassVar[dict[str | None, list[Any]]] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that this reader, or one of YAML 1.1, would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_row(self, data: list[Any]) -> yaml.Node:
        """A list of scalars on one line, any other a line an item."""
        flow = not any(isinstance(item, (dict, list)) for item in data)
        return self.represent_sequence(f"{_TAG}seq", data, flow_style=flow)

    def represent_text(self, data: str) -> yaml.Node:
        """Control characters and odd line breaks survive only in double quotes."""
        return self.represent_scalar(f"{_TAG}str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(list, _Dumper.represent_row)
_Dumper.add_representer(str, _Dumper.represent_text)
for _name, _pattern in _SCALARS.items():
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"{_TAG}{_name}", re.compile(rf"(?:{_pattern.pattern})\Z"), None)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of mappings by dotted key."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out


def in_code(settings: Mapping[str, object]) -> str:
    """Settings by dotted name as a page shows them: each ``name=value`` between backticks, as on the command line."""
    return " ".join(
        f"`{name}={str(value).lower() if isinstance(value, bool) else value}`"
        for name, value in settings.items()
    )
