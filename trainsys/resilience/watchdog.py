"""A step that does not end: stacks, flight recorder and who is missing, then abort, so that a restart can follow.

Each rank's watchdog is a thread of its own and needs no other rank: it writes what its rank is doing to
``RUN/hang/``, waits a moment for the others' files there, and the first to be ready says what they add up to.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainsys.resilience.flight import dump_flight_recorder
from trainsys.resilience.hung import blame
from trainsys.telemetry.recorder import Recorder

EXIT_HUNG = 70
_OTHERS_S = 4.0
"""How long a rank waits for the others' files: their limits ran out at nearly the same time."""


@dataclass
class RankState:
    """What one rank was doing when its step took too long."""

    rank: int
    step: int
    seconds: float
    doing: str = ""
    """The collective it is in, e.g. ``all_reduce on tp``; empty: none."""
    last: str = ""
    """The last collective it finished."""
    counts: dict[str, int] = field(default_factory=dict)
    """axis -> collectives entered since the step began."""
    where: str = ""
    """The innermost frame of its main thread."""


class Watchdog:
    """Ends this process when no ``beat`` comes for ``timeout_s`` seconds (``setup_s`` before the first).

    ``groups``: axis -> the ranks of this rank's group on it. ``hosts``: each rank's node, for who blames nodes.
    """

    def __init__(
        self, folder: Path, rank: int, world: int, groups: dict[str, Sequence[int]], timeout_s: float, setup_s: float,
        hosts: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.hosts = hosts
        self.folder, self.rank, self.world, self.groups = folder, rank, world, groups
        self.timeout_s = timeout_s
        self._limit = setup_s
        self._state = RankState(rank, -1, 0.0)
        self._last_beat = time.monotonic()
        self._over = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name="trainsys-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()

    def beat(self, step: int) -> None:
        """``step`` has ended, or another sign of life."""
        self._last_beat = time.monotonic()
        self._limit = self.timeout_s
        self._state.step = step
        self._state.counts.clear()

    @contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Something that may take longer than a step: a save that is waited for, a load."""
        before, self._limit = self._limit, max(self._limit, seconds)
        self._last_beat = time.monotonic()
        try:
            yield
        finally:
            self._limit, self._last_beat = before, time.monotonic()

    def watch(self, recorder: Recorder) -> WatchedRecorder:
        """For ``Ledger.recorder``: collectives pass through to ``recorder`` and are noted on the way."""
        return WatchedRecorder(recorder, self._state)

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._limit / 4)):
            silent = time.monotonic() - self._last_beat
            if silent > self._limit:
                self._abort(silent)

    def _abort(self, silent: float) -> None:
        state = self._state
        state.seconds = silent
        state.where = _where(self._main)
        with suppress(OSError):  # a full disk must not keep a hung rank alive
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / f"rank_{self.rank:05d}.stacks.txt", "w", encoding="utf-8") as out:
                faulthandler.dump_traceback(out, all_threads=True)
            device = dump_flight_recorder(self.folder / f"rank_{self.rank:05d}.flight.pickle")
            if device is not None:
                # The host launches and goes on: what it is in says nothing about its device.
                state.doing, state.last, state.counts = device.doing, device.last, device.counts
            beside = self.folder / f".rank_{self.rank:05d}"
            beside.write_text(json.dumps(asdict(state)), encoding="utf-8")
            beside.replace(self.folder / f"rank_{self.rank:05d}.json")
            self._report()
        os._exit(EXIT_HUNG)

    def _report(self) -> None:
        """Wait for the others' files, then, as the first to come here, say what they add up to."""
        deadline = time.monotonic() + _OTHERS_S
        while len(states := read_states(self.folder)) < self.world and time.monotonic() < deadline:
            time.sleep(0.05)
        with suppress(FileExistsError), open(self.folder / "report.txt", "x", encoding="utf-8") as out:
            text = explain(states, self.world, {axis: list(r) for axis, r in self.groups.items()})
            text += f"; stacks and flight recorder: {self.folder}"
            out.write(text + "\n")
            sys.stderr.write(f"trainsys: hang: {text}\n")
            sys.stderr.flush()
            blame(EXIT_HUNG, f"hang: {text}", states, self.world, self.hosts)


class WatchedRecorder:
    """Notes the collective under way, so that a watchdog can name it."""

    def __init__(self, recorder: Recorder, state: RankState) -> None:
        self._recorder, self._state = recorder, state

    def collective_span(self, axis: str, op: str, nbytes: int) -> AbstractContextManager[None]:
        return _Watched(self._state, axis, op, self._recorder.collective_span(axis, op, nbytes))

    def waiting(self, axis: str, stream: Any) -> AbstractContextManager[None]:
        return self._recorder.waiting(axis, stream)


class _Watched:
    """A plain class, as every collective of a step pays for it."""

    __slots__ = ("_axis", "_doing", "_span", "_state")

    def __init__(self, state: RankState, axis: str, op: str, span: AbstractContextManager[None]) -> None:
        self._state, self._axis, self._doing, self._span = state, axis, f"{op} on {axis}", span

    def __enter__(self) -> None:
        counts = self._state.counts
        counts[self._axis] = counts.get(self._axis, 0) + 1
        self._state.doing = self._doing
        self._span.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._span.__exit__(*error)
        if error[0] is None:  # else it is the collective that this rank failed in
            self._state.doing, self._state.last = "", self._doing


def read_states(folder: Path) -> dict[int, RankState]:
    states = {}
    for path in sorted(folder.glob("rank_*.json")):
        with suppress(ValueError, TypeError, OSError):
            state = RankState(**json.loads(path.read_text(encoding="utf-8")))
            states[state.rank] = state
    return states


def explain(states: dict[int, RankState], world: int, groups: dict[str, list[int]]) -> str:
    """One line: the last collective, who waits in it, and who is missing from it.

    A rank that left no word is missing; so is one that is in no collective while others wait; else those that
    have entered the fewest collectives are behind, and the others wait for them.
    """
    silent = [rank for rank in range(world) if rank not in states]
    waiting = {rank: s for rank, s in states.items() if s.doing}
    step = max((s.step for s in states.values()), default=-1) + 1
    said = [f"step {step} has not ended after {max(s.seconds for s in states.values()):.0f} s"]
    if waiting:
        by_work: dict[str, list[int]] = {}
        for rank, s in waiting.items():
            by_work.setdefault(s.doing, []).append(rank)
        said += [f"{_ranks(ranks)} in {doing}" for doing, ranks in by_work.items()]
    missing = [f"rank {rank} is missing: no word from it (stopped or lost)" for rank in silent]
    for rank, s in states.items():
        if not s.doing:
            after = f", after {s.last}" if s.last else ""
            missing.append(f"rank {rank} is missing: in no collective{after}, at {s.where}")
    if not missing and waiting:
        total = {rank: sum(s.counts.values()) for rank, s in waiting.items()}
        low = min(total.values())
        if any(n > low for n in total.values()):
            behind = [rank for rank, n in total.items() if n == low]
            missing = [f"{_ranks(behind)} behind: {low} collectives where others have {max(total.values())}"]
    return "; ".join(said + missing)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"


def _where(thread: int | None) -> str:
    frame = sys._current_frames().get(thread or 0)
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}" if frame else "?"

