from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainsys.config.root import config_root
from trainsys.config.schema import json_schema
from trainsys.config.text import parse_document

jsonschema = pytest.importorskip("jsonschema")
FILES = sorted(p for folder in ("models", "train") for p in (config_root() / folder).glob("*.yaml"))


def errors(values: Any) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(json_schema()).iter_errors(values)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_schema_accepts_the_shipped_configs(file: Path) -> None:
    values, _ = parse_document(file.read_text(), file.name)
    assert errors(values) == []


@pytest.mark.parametrize(
    "text",
    [
        "tp: 2",
        "parallel: {tpp: 2}",
        "train: {steps: x}",
        "train: {dtype: fp8}",
        "include: 3",
        "optim: {lr: 0}",
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(text: str) -> None:
    assert errors(yaml.safe_load(text))


def test_the_schema_is_a_schema_and_explains_fields() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert json.loads(json.dumps(schema)) == schema
    assert "sequences per optimizer step" in json.dumps(schema)
