"""A CRD as a strict JSON schema: ``python from_crd.py CRD.yaml SOURCE > NAME.json``. Unknown fields are refused, as
``kubectl create`` does; status and descriptions are left out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

KEPT = (
    "type",
    "enum",
    "required",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "maxItems",
    "minItems",
)


def strict(node: dict[str, Any]) -> dict[str, Any]:
    """One node of an OpenAPI v3 schema as JSON schema."""
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: node[key] for key in KEPT if key in node}
    if "properties" in node:
        made["properties"] = {name: strict(inner) for name, inner in node["properties"].items()}
        made["additionalProperties"] = bool(node.get("x-kubernetes-preserve-unknown-fields"))
    elif "additionalProperties" in node:
        made["additionalProperties"] = strict(node["additionalProperties"])
    if "items" in node:
        made["items"] = strict(node["items"])
    return made


def convert(crd: dict[str, Any], source: str) -> dict[str, Any]:
    """The schema of a whole object."""
    spec = crd["spec"]
    (version,) = spec["versions"]
    name = {"type": "string", "maxLength": 63, "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}
    texts = {"type": "object", "additionalProperties": {"type": "string"}}
    return {
        "$comment": f"From {source} by from_crd.py",
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
        "properties": {
            "apiVersion": {"const": f"{spec['group']}/{version['name']}"},
            "kind": {"const": spec["names"]["kind"]},
            "metadata": {
                "type": "object",
                "required": ["name"],
                "additionalProperties": False,
                "properties": {
                    "name": name, "namespace": {"type": "string"}, "labels": texts, "annotations": texts,
                },
            },
            "spec": strict(version["schema"]["openAPIV3Schema"]["properties"]["spec"]),
        },
    }  # fmt: skip


if __name__ == "__main__":
    print(
        json.dumps(convert(yaml.safe_load(Path(sys.argv[1]).read_text()), sys.argv[2]), separators=(",", ":"))
    )
