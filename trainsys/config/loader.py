"""From a YAML file, what it includes and overrides like ``parallel.tp=2`` to a checked config.

A file may start with ``include:`` and one name or a list of names. Included files are merged in order
below the file itself: mappings key by key, anything else replaced, later wins, overrides last. A name
is looked for beside the including file, then among the configs that come with trainsys
(``models/llama3-8b``), with or without ``.yaml``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from trainsys.config.mistakes import explain
from trainsys.config.root import config_root
from trainsys.config.run import RunConfig
from trainsys.config.secrets import without_secrets
from trainsys.config.text import Tree, dump, parse_document, parse_scalar
from trainsys.errors import UserError

T = TypeVar("T", bound=BaseModel)

_SUFFIX = ".yaml"


def load_run(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The run that ``path`` and ``overrides`` describe; UserError, one line a mistake, if they do not."""
    return load(path, RunConfig, overrides)


def load(path: str | Path, schema: type[T], overrides: Iterable[str] = ()) -> T:
    """A file, its includes and overrides, checked against any config model."""
    return build(read_tree(path, overrides), schema)


def build(tree: Tree, schema: type[T]) -> T:
    """Check a merged tree. Raises UserError with every mistake, one a line, each with its origin."""
    try:
        # By way of JSON, so that strict mode takes a list for a tuple; it still takes no text for a number.
        return schema.model_validate_json(json.dumps(tree.values))
    except ValidationError as error:
        raise UserError("\n".join(explain(error, tree, schema))) from None


def read_tree(path: str | Path, overrides: Iterable[str] = ()) -> Tree:
    """The merged values of a file, its includes and overrides, not yet checked against a model."""
    file = _find(str(path), beside=Path(), asked_by="")
    tree = _read_file(file, shown=_shown(path, file), chain=())
    for override in overrides:
        _merge(tree, _read_override(override))
    return tree


def resolved_yaml(config: BaseModel) -> str:
    """Everything a config resolved to, defaults included, as YAML that loads back to the same config."""
    return dump(config.model_dump(mode="json"))


def _read_file(file: Path, shown: str, chain: tuple[Path, ...]) -> Tree:
    real = file.resolve()
    if real in chain:
        names = " -> ".join(link.name for link in (*chain[chain.index(real) :], real))
        raise UserError(f"{shown}: includes itself: {names}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{shown}: not a UTF-8 text file") from None
    except OSError as error:
        raise UserError(f"{shown}: cannot be read: {error.strerror}") from None
    values, origins = parse_document(text, shown)
    if values is None:
        raise UserError(f"{shown}: empty; it needs at least a `model:` section or an `include:`")
    if not isinstance(values, dict):
        raise UserError(f"{shown}: a config is a mapping of sections, but this file is {_kind(values)}")

    includes = values.pop("include", [])
    asked_by = origins.get(("include",), shown)
    if isinstance(includes, str):
        includes = [includes]
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise UserError(f"{asked_by}: include: expected a file name or a list of file names")
    tree = Tree()
    for name in includes:
        target = _find(name, beside=file.parent, asked_by=asked_by)
        _merge(tree, _read_file(target, _shown(name, target), (*chain, real)))
    own = Tree(values, {path: origin for path, origin in origins.items() if path[:1] != ("include",)})
    _merge(tree, own)
    tree.origins[()] = shown
    return tree


def _read_override(text: str) -> Tree:
    """``a.b=value`` as a tree of one path."""
    source = f"override {without_secrets([text])[0]}"
    key, equals, written = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"{source}: an override is written section.key=value, like parallel.tp=2")
    if written.strip()[:1] in ("[", "{", '"', "'"):
        value, _ = parse_document(written, source)
    else:
        value = parse_scalar(written, source)
    tree = Tree(origins={tuple(parts[: n + 1]): source for n in range(len(parts))})
    inner = tree.values
    for part in parts[:-1]:
        inner = inner.setdefault(part, {})
    inner[parts[-1]] = value
    return tree


def _merge(base: Tree, over: Tree) -> None:
    """Lay ``over`` on ``base``, in place."""
    _merge_values(base.values, over.values)
    base.origins.update(over.origins)


def _merge_values(base: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge_values(base[key], value)
        else:
            base[key] = value


def _find(name: str, beside: Path, asked_by: str) -> Path:
    """The file that ``name`` means: beside the asking file, else among the shipped configs."""
    root = config_root()
    for folder in (beside, root):
        for candidate in (folder / name, folder / f"{name}{_SUFFIX}"):
            if candidate.is_file():
                return candidate
    prefix = f"{asked_by}: include: " if asked_by else ""
    if (beside / name).is_dir():
        raise UserError(f"{prefix}{name}: is a folder; name a file in it")
    shipped = [str(file.relative_to(root).with_suffix("")) for file in root.glob(f"*/*{_SUFFIX}")]
    short = {Path(known).name: known for known in shipped}
    wanted = name.removesuffix(_SUFFIX)
    close = get_close_matches(wanted, [*shipped, *short], n=1)
    hint = f"; did you mean {short.get(close[0], close[0])}?" if close else ""
    raise UserError(f"{prefix}{name}: no such file here or among the configs of trainsys{hint}")


def _shown(asked: str | Path, found: Path) -> str:
    """How a file is named in messages: as the user did, or by its place among the shipped configs."""
    root = config_root()
    if found.is_relative_to(root):
        return str(found.relative_to(root))
    return str(found if found.name != Path(asked).name else asked)


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"the {type(value).__name__} {str(value)[:30]!r}"
