"""What a benchmark has found, for whoever watches and for `profiling/results`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def record(found: Mapping[str, Any], path: str | Path | None) -> None:
    """Print ``found`` as JSON, and write it to ``path`` where one is given."""
    text = json.dumps(found, indent=1)
    print(text)
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text + "\n", encoding="utf-8")
