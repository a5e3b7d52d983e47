"""The arguments of events: decoded together where they are as typed, one by one and mended where they are not."""

from __future__ import annotations

import ast
from collections import Counter
from typing import Any

import msgspec
from msgspec import Raw

from trainsys.profiler.trace.decode import mend
from trainsys.profiler.trace.events import AnyEvent, Args, CallArgs

_ARGS = msgspec.json.Decoder(list[Args])
_CALL_ARGS = msgspec.json.Decoder(list[CallArgs])
_ARGS_LAX = msgspec.json.Decoder(Args, strict=False)
_NO_ARGS = Args()


def args_of(bucket: list[AnyEvent], said: Counter[str]) -> list[Args]:
    """Each event's arguments; ``said`` counts what was mended or given up."""
    if bucket and not isinstance(bucket[0].args, Raw):
        return [e.args for e in bucket]  # decoded with the event
    try:
        return _ARGS.decode(_together(bucket))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return [_lax(e.args, said) for e in bucket]


def correlations_of(bucket: list[AnyEvent], said: Counter[str]) -> list[int]:
    """Each runtime call's correlation id."""
    args: list[Any] = []
    if bucket and isinstance(bucket[0].args, Raw):
        try:
            args = _CALL_ARGS.decode(_together(bucket))
        except (msgspec.DecodeError, UnicodeDecodeError):
            args = args_of(bucket, said)
    else:
        return [e.args.correlation for e in bucket]  # type: ignore[attr-defined]
    return [a.correlation for a in args]


def _together(bucket: list[AnyEvent]) -> bytes:
    return b"[" + b",".join([e.args or b"{}" for e in bucket]) + b"]"


def _lax(raw: Raw, said: Counter[str]) -> Args:
    for text in (bytes(raw) or b"{}", None):
        try:
            return _ARGS_LAX.decode(mend(bytes(raw), said) if text is None else text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
    said["dropped: arguments of an event, of the wrong type"] += 1
    return _NO_ARGS


def number(text: int | str) -> int:
    """``7`` of ``7`` or of ``"stream 7"``; -1 without a number."""
    if isinstance(text, int):
        return text
    last = text.rsplit(" ", 1)[-1]
    return int(last) if last.isdigit() else -1


def ranks(text: str | None) -> tuple[int, ...]:
    """The list a trace writes as text; long ones are elided by NCCL's logger (``[0, 1, ..., 7]``) and unusable."""
    if not text or "..." in text:
        return ()
    try:
        return tuple(int(r) for r in ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return ()


def shapes(a: Args) -> tuple[tuple[tuple[int, ...], ...], str]:
    """(dimensions of each input, first floating type named)."""
    try:
        raw = msgspec.json.decode(a.dims or b"[]")
        dims = tuple(tuple(int(x) for x in d) if all(isinstance(x, int) for x in d) else () for d in raw)
        types = [t for t in msgspec.json.decode(a.types or b"[]") if isinstance(t, str)]
    except (msgspec.DecodeError, TypeError, ValueError):
        return (), ""
    return dims, next((t for t in types if t not in ("", "Scalar", "ScalarList", "GenericList")), "")
