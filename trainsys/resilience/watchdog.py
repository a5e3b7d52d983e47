"""A step that does not end: stacks, flight recorder and who is missing, then abort, so that a restart can follow.

Each rank's watchdog is a thread of its own and needs no other rank: it writes what its rank is doing to ``RUN/hang/``.
The first rank there reads the others' files, each once, and says what they add up to; the others only wait for that.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainsys.rank_lists import ranks_named
from trainsys.resilience.flight import dump_flight_recorder
from trainsys.resilience.hung import blame
from trainsys.telemetry.recorder import Recorder
from trainsys.threads import helper

EXIT_HUNG = 70
_OTHERS_S = 4.0
"""How long the reader waits for the others' files: their limits ran out at nearly the same time."""
_POLL_S = 0.2
_MOST_PLACES = 4
"""Collectives, or places in the code, that a report shows."""


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
    """Ends this process when no ``beat`` comes for ``timeout_s`` seconds (``setup_s`` before the first), also when
    there is no memory left: what that takes is made beforehand.

    ``hosts``: each rank's node, for who blames nodes.
    """

    def __init__(
        self, folder: Path, rank: int, world: int, timeout_s: float, setup_s: float, hosts: Sequence[str] = ()
    ) -> None:
        self.folder, self.rank, self.world, self.hosts = folder, rank, world, hosts
        self.timeout_s = timeout_s
        self._limit = setup_s
        self._state = RankState(rank, -1, 0.0)
        self._last_beat = time.monotonic()
        self._over = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = helper("watchdog", self._watch)
        self._stacks = f"rank_{rank:05d}.stacks.txt"
        self._last_words = (
            f"trainsys: hang: rank {rank} has not ended its step in time, and there was no memory to say more; "
            f"stacks: {folder / self._stacks}\n"
        ).encode()

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
        while True:
            try:
                if self._over.wait(min(1.0, self._limit / 4)):
                    return
                silent = time.monotonic() - self._last_beat
                if silent > self._limit:
                    self._abort(silent)
            except (MemoryError, RuntimeError):  # the latter from a lock that there is no memory for
                # There may be some again; and if not, that is when a watchdog is needed.
                time.sleep(0.1)

    def _abort(self, silent: float) -> None:
        """Leave what is known behind, each part whatever became of the one before, and end the process."""
        try:
            parts: tuple[Callable[[], None], ...] = self._dump_stacks, self._dump_collectives, self._tell_state
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
            self._state.seconds = silent
            for part in parts:
                # A full disk, or no memory, must not keep a hung rank alive.
                with suppress(OSError, MemoryError):
                    part()
            self._report()
        except BaseException:
            os.write(2, self._last_words)
        finally:
            os._exit(EXIT_HUNG)

    def _dump_stacks(self) -> None:
        with open(self.folder / self._stacks, "w", encoding="utf-8") as out:
            faulthandler.dump_traceback(out, all_threads=True)

    def _tell_state(self) -> None:
        self._state.where = _where(self._main)
        beside = self.folder / f".rank_{self.rank:05d}"
        beside.write_text(json.dumps(asdict(self._state)), encoding="utf-8")
        beside.replace(self.folder / f"rank_{self.rank:05d}.json")

    def _dump_collectives(self) -> None:
        device = dump_flight_recorder(self.folder / f"rank_{self.rank:05d}.flight.pickle")
        if device is not None:
            # The host launches and goes on: what it is in says nothing about its device.
            self._state.doing, self._state.last, self._state.counts = device.doing, device.last, device.counts

    def _report(self) -> None:
        """As the first to come here: wait for the others' files and say what they add up to. Else: until that is said,
        since a launcher ends every rank when one has ended."""
        report = self.folder / "report.txt"
        deadline = time.monotonic() + _OTHERS_S
        try:
            os.close(os.open(self.folder / ".reader", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            while not report.exists() and time.monotonic() < deadline + _OTHERS_S:
                time.sleep(_POLL_S)
            return
        except OSError:
            report = None  # nowhere to write: what this rank knows of itself
        states = {self.rank: self._state}
        while report and time.monotonic() < deadline:
            read_states(self.folder, states)
            if len(states) == self.world:
                break
            time.sleep(_POLL_S)
        text = explain(states, self.world)
        text += f"; stacks and flight recorder: {self.folder}"
        # Past Python's own buffer, whose lock the hung thread may hold.
        os.write(2, f"trainsys: hang: {text}\n".encode())
        blame(EXIT_HUNG, f"hang: {text}", states, self.world, self.hosts)
        if report:
            beside = self.folder / ".report"
            beside.write_text(text + "\n", encoding="utf-8")
            beside.replace(report)


class WatchedRecorder:
    """Notes the collective under way, so that a watchdog can name it."""

    def __init__(self, recorder: Recorder, state: RankState) -> None:
        self._recorder, self._state = recorder, state

    def collective_span(self, axis: str, op: str, nbytes: int) -> AbstractContextManager[None]:
        return _Watched(self._state, axis, op, self._recorder.collective_span(axis, op, nbytes))


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


def read_states(folder: Path, states: dict[int, RankState]) -> dict[int, RankState]:
    """``states`` and what other ranks left in ``folder``; files of ranks that are there already are not read again."""
    for name in os.listdir(folder):
        number = name.removeprefix("rank_").removesuffix(".json")
        if not number.isdigit() or int(number) in states:
            continue
        with suppress(ValueError, TypeError, OSError):
            state = RankState(**json.loads((folder / name).read_text(encoding="utf-8")))
            states[state.rank] = state
    return states


def explain(states: dict[int, RankState], world: int) -> str:
    """One line of bounded length: the last collective, who waits in it, and who is missing from it.

    A rank that left no word is missing; so is one that is in no collective while others wait; else those that
    have entered the fewest collectives are behind, and the others wait for them.
    """
    waiting = {rank: s for rank, s in states.items() if s.doing}
    step = max((s.step for s in states.values()), default=-1) + 1
    said = [f"step {step} has not ended after {max(s.seconds for s in states.values()):.0f} s"]
    missing = []
    if silent := set(range(world)) - states.keys():
        missing.append(f"{_are(silent)} missing: no word (stopped or lost)")
    idle = {
        rank: f"in no collective{f', after {s.last}' if s.last else ''}, at {s.where}"
        for rank, s in states.items()
        if not s.doing
    }
    missing += [f"{_are(ranks)} missing: {place}" for place, ranks in _rarest_first(idle)]
    if not missing and waiting:
        total = {rank: sum(s.counts.values()) for rank, s in waiting.items()}
        low = min(total.values())
        if any(n > low for n in total.values()):
            behind = [rank for rank, n in total.items() if n == low]
            missing = [f"{_are(behind)} behind: {low} collectives where others have {max(total.values())}"]
    said += [f"{_are(ranks)} in {doing}" for doing, ranks in _rarest_first({r: s.doing for r, s in waiting.items()})]
    return "; ".join(said + missing)


def _rarest_first(said: dict[int, str]) -> Iterator[tuple[str, list[int]]]:
    """(text, ranks) by rising number of ranks, as what few do is what holds up the many; those beyond
    ``_MOST_PLACES`` together."""
    groups: dict[str, list[int]] = {}
    for rank, text in said.items():
        groups.setdefault(text, []).append(rank)
    order = sorted(groups.items(), key=lambda group: (len(group[1]), group[1]))
    yield from order[:_MOST_PLACES]
    if rest := order[_MOST_PLACES:]:
        yield f"{len(rest):,} other places", [rank for _, ranks in rest for rank in ranks]


def _are(ranks: Collection[int]) -> str:
    return f"{ranks_named(ranks)} {'is' if len(ranks) == 1 else 'are'}"


def _where(thread: int | None) -> str:
    frame = sys._current_frames().get(thread or 0)
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}" if frame else "?"
