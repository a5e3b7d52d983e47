"""The JSON schema of run configs, for completion and checks in an editor."""

from __future__ import annotations

from typing import Any

from trainsys.config.run import RunConfig


def json_schema() -> dict[str, Any]:
    """What one file under configs/ may say.

    A file may leave out what it includes, so nothing is required here; the loader checks the whole.
    """
    schema = RunConfig.model_json_schema()
    for section in (schema, *schema.get("$defs", {}).values()):
        section.pop("required", None)
    names = {"type": "string"}
    schema["properties"]["include"] = {
        "description": "files merged below this one: beside it, or among the configs of trainsys",
        "anyOf": [names, {"type": "array", "items": names}],
    }
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema
