"""A stack of an allocation to one line: whose code, under which modules, in which part of the step."""

from __future__ import annotations

import re
from typing import Any

_LIBRARY = re.compile(
    r"site-packages|dist-packages|/torch/|<frozen|<string>|importlib|/usr/local/src/|/croot/|/lib/python3\.\d+/(?!site)"
)
_COMPILED = re.compile(r"torchinductor|/inductor_cache/|compiled_fx_graph|__compiled_fn")
_BACKWARD = re.compile(r"(\w+)::apply")


class Stacks:
    """Names stacks, each distinct list of frames once (snapshots share them between thousands of events)."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Any, tuple[str, str, str]]] = {}

    def name(self, frames: Any) -> tuple[str, str, str]:
        """(where, module path, part)."""
        if not isinstance(frames, list) or not frames:
            return "no stack recorded (allocated before the recording began)", "", "before the recording"
        known = self._seen.get(id(frames))
        if known is not None and known[0] is frames:
            return known[1]
        named = _name([f for f in frames if isinstance(f, dict)])
        self._seen[id(frames)] = (frames, named)
        return named


def _name(frames: list[dict[str, Any]]) -> tuple[str, str, str]:
    files = [str(f.get("filename", "")) for f in frames]
    names = [str(f.get("name", "")) for f in frames]
    own = next((i for i, f in enumerate(files) if _is_own(f)), None)
    backward = next((m[1] for n in names if "Backward" in n and (m := _BACKWARD.search(n))), "")
    optimizer = any("/optim/" in f or "optimizer" in f.lower() for f in files)
    compiled = next((f for f in files if _COMPILED.search(f)), None)
    if compiled is not None:
        # Each buffer of generated code has a line of its own: its region is what a reader knows.
        caller = next((i for i, f in enumerate(files) if i > files.index(compiled) and _is_own(f)), None)
        where = f"compiled region {_short(compiled).rsplit('/', 1)[-1]}"
        if caller is not None:
            where += f", called at {_short(files[caller])}:{frames[caller].get('line')}"
    elif own is not None:
        where = f"{_short(files[own])}:{frames[own].get('line')} in {names[own]}"
    elif backward:
        where = f"autograd: {backward}"
    else:
        where = next(
            (
                n
                for n in names
                if n.startswith(("at::native", "at::_ops", "torch::"))
                and "unwind" not in n
                and "Traceback" not in n
            ),
            names[0],
        )[:120]
    # Outermost first: the forward methods of the user's own files are the modules.
    path = [
        f"{_short(f)}:{frames[i].get('line')}"
        for i, f in enumerate(files)
        if names[i] == "forward" and f.endswith(".py") and not _LIBRARY.search(f)
    ]
    module = " > ".join(reversed(path))
    if optimizer:
        part = "optimizer"
    elif backward or any("autograd::Engine" in n for n in names):
        part = "backward"
    elif "forward" in names:
        part = "forward"
    elif any(f.endswith(".py") for f in files):
        part = "input/parameters"
    else:
        part = "unknown"
    return where, module or (f"backward of {backward}" if backward else "outside modules"), part


def _is_own(path: str) -> bool:
    return path.endswith(".py") and not _LIBRARY.search(path) and not _COMPILED.search(path)


def _short(path: str) -> str:
    return "/".join(path.replace("\\", "/").split("/")[-2:])
