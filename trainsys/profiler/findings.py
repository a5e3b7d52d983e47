"""What a running job has been told of each finding: it is said once, again when it is worse, and when it is over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from trainsys.profiler.verdict import Verdict

LASTING = 32
"""Windows after which a finding that is still there is no accident: two looks that share none."""
GONE = 2
"""Looks in a row without it, after which it is over."""
_WORSE = 2.0


@dataclass
class _Known:
    said: Verdict
    window: int
    """How many there had been when it was first found."""
    missed: int = 0
    lasting: bool = False


class Findings:
    """``look`` takes what each look at the last windows found, and yields what is news."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], _Known] = {}
        self._ended: dict[tuple[object, ...], int] = {}
        """The last step of a finding that is over: later looks still see it behind them."""

    def look(self, verdicts: Iterable[Verdict], window: int, step: int) -> Iterator[Verdict]:
        """``window``: how many there have been; ``step``: the last. A verdict's ``news`` says what it is."""
        found = {v.key: v for v in verdicts}
        for key, v in found.items():
            known = self._known.get(key)
            if v.until is not None:  # it came and went within the windows looked at, or has just ended
                if known is not None:
                    yield from self._over(key, v.until)
                elif v.since > self._ended.get(key, -1):
                    self._ended[key] = v.until
                    yield v
            elif known is None:
                self._known[key] = _Known(v, window)
                yield v
            else:
                known.missed = 0
                if v.cost_s >= _WORSE * known.said.cost_s:
                    known.said = replace(v, since=known.said.since)
                    yield replace(known.said, news="worse")
                if not known.lasting and window - known.window >= LASTING:
                    known.lasting = True
                    yield replace(v, since=known.said.since, news="lasting")
        for key in [key for key in self._known if key not in found]:
            known = self._known[key]
            known.missed += 1
            if known.missed >= GONE:
                yield from self._over(key, step)

    def _over(self, key: tuple[object, ...], until: int) -> Iterator[Verdict]:
        self._ended[key] = until
        yield replace(self._known.pop(key).said, until=until, news="over")
