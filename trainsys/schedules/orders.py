"""The order of one rank's work under each schedule, as phases: a pattern of operations, so many times.

``F0`` is the forward of the rank's first stage, ``B1`` the backward of its second; which micro-batch is
meant follows, since each (operation, stage) takes them in order. ``W`` alone is the oldest weight gradient
that is still owed.
"""

from __future__ import annotations

from collections import deque

from trainsys.schedules.actions import Action, Op


class _Writer:
    """Writes patterns out into actions."""

    def __init__(self, stages: tuple[int, ...]) -> None:
        self.stages = stages
        self.actions: list[Action] = []
        self.owed: deque[tuple[int, int]] = deque()
        self._next: dict[tuple[str, int], int] = {}

    def do(self, pattern: str, times: int) -> None:
        for _ in range(times):
            for word in pattern.split():
                if word == "W":
                    self.weight(*self.owed[0])
                elif word[0] == "W":
                    stage = self.stages[int(word[1:])]
                    self.weight(*next(item for item in self.owed if item[0] == stage))
                else:
                    self.put(word[0], int(word[1:]))  # type: ignore[arg-type]  # a pattern's letter is an Op

    def put(self, op: Op, chunk: int) -> None:
        # Whole and split backwards count on together.
        key = ("F" if op == "F" else "B", chunk)
        micro = self._next.get(key, 0)
        self._next[key] = micro + 1
        self.actions.append(Action(op, self.stages[chunk], micro))
        if op == "I":
            self.owed.append((self.stages[chunk], micro))

    def weight(self, stage: int, micro: int) -> None:
        self.owed.remove((stage, micro))
        self.actions.append(Action("W", stage, micro))


def gpipe(rank: int, stages: tuple[int, ...], ranks: int, micros: int) -> list[Action]:
    """All forwards, then all backwards (Huang et al. 2019)."""
    w = _Writer(stages)
    w.do("F0", micros)
    w.do("B0", micros)
    return w.actions


def one_f_one_b(rank: int, stages: tuple[int, ...], ranks: int, micros: int) -> list[Action]:
    """As few forwards ahead as keep the last stage busy (PipeDream-flush: Narayanan et al. 2021a)."""
    w = _Writer(stages)
    ahead = min(micros, ranks - 1 - rank)
    w.do("F0", ahead)
    w.do("F0 B0", micros - ahead)
    w.do("B0", ahead)
    return w.actions


def rounds(ranks: int, micros: int) -> int:
    """Into how many rounds interleaved schedules cut the micro-batches: each of at least one a rank."""
    return max(1, micros // ranks)


def interleaved(rank: int, stages: tuple[int, ...], ranks: int, micros: int) -> list[Action]:
    """1F1B over several stages a rank, which divides the bubble by their number (Narayanan et al. 2021b)."""
    return _in_rounds(rank, stages, ranks, micros, split=False)


def zero_bubble(rank: int, stages: tuple[int, ...], ranks: int, micros: int) -> list[Action]:
    """Weight gradients wait until there would be a bubble: ZB-H1, as much in flight as in 1F1B; over several
    stages a rank, interleaved (Qi et al. 2024)."""
    return _in_rounds(rank, stages, ranks, micros, split=True)


def _in_rounds(
    rank: int, stages: tuple[int, ...], ranks: int, micros: int, *, split: bool
) -> list[Action]:
    """A round of micro-batches goes through all of the rank's stages before the next round starts.

    The forward warm-up covers what the last rank needs, and one (split) or two more a hop away from it.
    """
    w, v = _Writer(stages), len(stages)
    size, total = micros // rounds(ranks, micros), micros * v
    ahead = min(total, (v - 1) * size + (ranks - 1 - rank) * (1 if split else 2))
    for k in range(total + ahead):
        if k < total:
            w.put("F", k // size % v)
        if k >= ahead:
            back = k - ahead
            w.put("I" if split else "B", v - 1 - back // size % v)
            # Ranks that come later in the pipeline run earlier in backward, and can owe as many for as long.
            if split and back >= rank:
                w.do("W", 1)
    w.do("W", len(w.owed))
    return w.actions


def zbv(rank: int, stages: tuple[int, ...], ranks: int, micros: int) -> list[Action]:
    """ZB-V: no bubble where F = I = W, in no more memory than 1F1B (Qi et al. 2024, section 6).

    The phases assume enough micro-batches to fill the pipeline; with fewer, those that there are not are left out.
    """
    w, p, r = _Writer(stages), ranks, rank
    n = max(2 * p - 1, micros)
    w.do("F0", 2 * (p - r) - 1)
    w.do("F1 F0", r)
    w.do("F1 I1 W1", p - r)
    w.do("F0 I0 W0 F1 I1 W1", n - 2 * p + r + 1)
    w.do("I0 W0 F1 I1 W1", p - r - 1)
    w.do("I0 I1", r)
    w.do("I0 W0", p - r)
    w.do("W1", r)
    w.do("W0", r)
    return [a for a in w.actions if a.micro < micros]


def dualpipev(rank: int, stages: tuple[int, ...], ranks: int, micros: int) -> list[Action]:
    """DualPipe (DeepSeek-AI 2024) cut in half into a V, which needs no second copy of the weights.

    Main phase: a forward of one stage beside a backward of the other, so that their communication may overlap.
    """
    w, p, r = _Writer(stages), ranks, rank
    w.do("F0", 2 * (p - r - 1))
    w.do("F0 F1", r + 1)
    w.do("I1 W F1", p - r - 1)
    w.do("F0 B1 F1 B0", micros - 2 * p + r + 1)
    w.do("B1 F1 B0", p - r - 1)
    # Backwards of both stages in turn, of which the second half leaves its weights for the end.
    for k in range(2 * (r + 1)):
        w.put("B" if k <= r else "I", 1 - k % 2)
    w.do("W I0", p - r - 1)
    w.do("W", len(w.owed))
    return w.actions
