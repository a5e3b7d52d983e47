"""A partial manifest laid over a whole one, by the rules of Kubernetes' strategic merge patch."""

from __future__ import annotations

from typing import Any

_IDENTITIES = ("name", "mountPath", "topologyKey")
"""Fields by which the items of a list are told apart: containers and volumes, mounts, spread constraints."""


def merge(base: Any, over: Any) -> Any:
    """``base`` with ``over`` laid on it; neither is changed.

    Mappings are merged key by key; null removes a key. Lists whose items all have one of ``_IDENTITIES`` are merged item
    by item, and an item with ``$patch: delete`` is removed; any other list, and any other value, is replaced.
    """
    if isinstance(over, dict):
        merged = dict(base) if isinstance(base, dict) else {}
        for key, value in over.items():
            if value is None:
                merged.pop(key, None)
            else:
                merged[key] = merge(merged.get(key), value)
        return merged
    if isinstance(base, list) and isinstance(over, list) and (identity := _identity([*base, *over])):
        items = {item[identity]: item for item in base}
        for item in over:
            if item.get("$patch") == "delete":
                items.pop(item[identity], None)
            else:
                items[item[identity]] = merge(items.get(item[identity]), item)
        return list(items.values())
    return over


def _identity(items: list[Any]) -> str | None:
    return next(
        (f for f in _IDENTITIES if items and all(isinstance(i, dict) and f in i for i in items)), None
    )
