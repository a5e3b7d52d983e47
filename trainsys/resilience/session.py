"""One attempt of a run: from which step it goes on, when it saves, what it does about a bad step, when it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

from trainsys import __version__
from trainsys.blame import this_node
from trainsys.checkpoint.compare import changes
from trainsys.checkpoint.folder import Folder
from trainsys.checkpoint.initial import load_weights, open_weights, refuse_unused
from trainsys.checkpoint.peers import PeerMemory
from trainsys.checkpoint.ranks import Ranks
from trainsys.checkpoint.resume import Found, find, load, refuse_other_run, rng_state
from trainsys.checkpoint.saver import Progress, Saver
from trainsys.config.run import RunConfig
from trainsys.data import Source, StepData
from trainsys.data.order import samples_seen
from trainsys.engines.base import SAVE, STOP, Engine, StepResult
from trainsys.errors import UserError
from trainsys.failure import RESTARTS
from trainsys.layout import PLACED, Layout
from trainsys.parallel.mesh import Mesh
from trainsys.resilience.anomalies import Guard
from trainsys.resilience.drain import Drain
from trainsys.resilience.lease import Lease
from trainsys.resilience.watchdog import Watchdog
from trainsys.telemetry.attempts import Origin
from trainsys.telemetry.recorder import Recorder

_SLOWER = 10.0
"""A save that takes so many times as long as the longest before, and longer than a step may, hangs."""


def attempt() -> int:
    """How often this job was started before: by a launcher or torchrun after a failure, by Slurm after a requeue, or by
    a JobSet."""
    env = os.environ
    # A JobSet's pods have its restart-attempt for a rendezvous id; the index is what marks them as an indexed Job's.
    made_anew = env.get("PET_RDZV_ID", "") if "JOB_COMPLETION_INDEX" in env else ""
    return (
        int(env.get(RESTARTS, 0))
        + int(env.get("TORCHELASTIC_RESTART_COUNT", 0))
        + int(env.get("SLURM_RESTART_COUNT", 0))
        + (int(made_anew) if made_anew.isdigit() else 0)
    )


class Run(Protocol):
    """What a session needs of the run's reporter."""

    run_dir: Path
    recorder: Recorder

    def warn(self, text: str) -> None: ...

    def say(self, text: str) -> None: ...


class Session:
    """What the loop asks: ``step`` and ``data_step`` come next, ``over`` ends it, ``after`` each step.

    Made before the engine: it looks for a checkpoint to go on from, or for weights to begin with, checks them whole
    and moves ``source`` to its place. All ranks act alike.
    ``lease``: held on the checkpoint folder. ``clock``: seconds, for ``checkpoint.every_minutes``; rank 0's counts.
    """

    def __init__(
        self,
        cfg: RunConfig,
        source: Source,
        drain: Drain,
        lease: Lease,
        ranks: Ranks,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cfg, self.drain, self.source, self.lease, self.ranks = cfg, drain, source, lease, ranks
        self._clock = clock
        self.folder = Folder(cfg.checkpoint_folder)
        self.attempt = attempt()
        self.data = source.describe()
        self._memory = (
            PeerMemory(cfg.checkpoint.memory_dir, cfg.checkpoint_folder, self.ranks)
            if cfg.checkpoint.memory_every
            else None
        )
        self.found: Found | None = find(
            self.folder, cfg.checkpoint.resume, self.ranks, restarted=self.attempt > 0, memory=self._memory
        )
        self.step = self.data_step = 0
        refuse_unused(cfg, self.found.manifest if self.found else None)
        self.weights = open_weights(cfg, self.ranks) if cfg.train.init_from and self.found is None else None
        if self.found is not None:
            refuse_other_run(self.found, cfg, self.data)
            was = self.found.manifest
            self.step, self.data_step = was.step, was.data_step
            source.go_on(was.data_step, samples_seen(was.config, was.samples, was.data_step, cfg))
        self.origin = self._origin()
        self.first_step = self.step
        self.over = self.step >= cfg.train.steps
        self.stopped = ""
        """Why the run ends before its last step; empty: it does not."""
        self._skipped = 0
        """Steps in a row, up to the latest, whose update was skipped."""
        self.guard = Guard(cfg.resilience)
        self.guard.at(self.step, self.data_step)
        self.drain.saved_step = self.step if self.found else None
        self._saver: Saver | None = None
        self._dog: Watchdog | None = None

    @property
    def complete(self) -> bool:
        """There was nothing left to do from the start."""
        return self.first_step >= self.cfg.train.steps

    def attach(self, engine: Engine, mesh: Mesh, run: Run) -> None:
        """Bring the state back, and start what watches over the loop."""
        self._engine, self._recorder, self._warn = engine, run.recorder, run.warn
        run_dir = run.run_dir
        cfg = self.cfg
        if self.ranks.rank == 0:
            self.folder.clean()
            self.guard.file = run_dir / "anomalies.jsonl"
            self.lease.named(run_dir.name)
            for note in self.lease.notes:
                run.warn(note)
        if not cfg.saves:
            run.warn(
                "SAVING IS OFF (checkpoint.every=0 and every_minutes=0): this run leaves no weights behind, and what "
                "ends it costs every step it has done"
            )
        self._saver = Saver(
            cfg.checkpoint,
            self.folder,
            self.ranks,
            lambda: [*engine.state(), *rng_state(self.ranks.rank)],
            {
                "lineage": self.origin.lineage or run_dir.name,
                "run_id": run_dir.name,
                "attempt": self.attempt,
                "resumed_from": self.origin.source,
                "engine": cfg.engine,
                "layout": {axis: mesh.layout.size(axis) for axis in (*PLACED, "ep")},
                "config": cfg.model_dump(mode="json"),
                "data": self.data,
                "versions": {"trainsys": __version__},
            },
            pinned=mesh.device.type == "cuda",
            warn=run.warn,
        )
        self._saver.memory = self._memory
        self._saver.may_write = self.lease.check
        if self._memory is not None and self._memory.alone:
            run.warn(
                "checkpoint.memory_every: there is one node only, so copies in memory survive processes, not it"
            )
        if cfg.resilience.hang_timeout_s:
            limits = cfg.resilience.hang_timeout_s, cfg.resilience.setup_timeout_s
            hosts = self.ranks.to_all(this_node())
            self._dog = Watchdog(run_dir / "hang", self.ranks.rank, self.ranks.world, *limits, hosts)
            mesh.ledger.recorder = self._dog.watch(run.recorder)
            self._dog.start()
        if self.found is not None:
            self._restore(self.found)
        elif self.weights is not None:
            with self._patient():
                load_weights(self.weights, engine)
            for note in self.weights.notes:
                run.warn(note)
        if self.cfg.saves or self.cfg.checkpoint.memory_every:
            with self._patient():
                self._saver.prepare()
        for line in self.origin.lines if self.ranks.rank == 0 else ():
            run.say(line)
        self._saved_at = self._clock()

    def _origin(self) -> Origin:
        lineage = ""
        if self.ranks.rank == 0 and (self.cfg.saves or self.cfg.checkpoint.memory_every or self.found is not None):
            lineage = self.folder.lineage(new=self.cfg.checkpoint.resume == "never" and self.attempt == 0)
        lineage = self.ranks.from_first(lineage)
        if self.weights is not None:
            path = str(self.weights.path)
            return Origin(lineage, path, (f"step 0 begins with the weights of {path}",))
        if self.found is None:
            return Origin(lineage)
        was = self.found.manifest
        by = f" of {was.run_id}" if was.run_id else ""
        lines = [
            f"resumed at step {was.step} from {self.found.where}{by}; batch {self.data_step}, sample "
            f"{self.source.first_sample(self.data_step)} comes next"
        ]
        layout = Layout.resolve(self.cfg.parallel, self.ranks.world)
        sizes = {axis: layout.size(axis) for axis in (*PLACED, "ep")}
        if differs := changes(was, self.cfg, sizes, self.ranks.world):
            lines.append(f"resumed with changes: {'; '.join(differs)}")
        return Origin(lineage, str(self.found.path), tuple(lines))

    @property
    def asks(self) -> float:
        """What this rank asks of all in the step that comes: to stop, and (rank 0) to save, for time is up."""
        minutes = self.cfg.checkpoint.every_minutes
        due = minutes and self.ranks.rank == 0 and self._clock() - self._saved_at >= 60.0 * minutes
        return (STOP if self.drain.requested else 0.0) + (SAVE if due else 0.0)

    def say_complete(self) -> None:
        """Tell that the run needs no more steps: a restart that came after the last save."""
        if self.ranks.rank == 0:
            print(
                f"trainsys: {self.cfg.name} is complete: step {self.step} is in {self.folder.root}, and train.steps "
                f"is {self.cfg.train.steps}; raise it to train on, or choose another name to start anew"
            )

    def after(self, data: StepData, result: StepResult) -> None:
        """The step is done: act on what was wrong with it, save where that is due, stop where that was asked."""
        self.drain.begin()
        if self._dog is not None:
            self._dog.beat(self.step)
        self.data_step = data.step + 1
        self.step += 1
        assert self._saver is not None
        loss = float(result.scalars[0])
        normal = result.applied and self.guard.last is None
        self._skipped = 0 if normal else self._skipped + 1
        self._saver.judged(self.step, normal)
        if self.guard.last is not None:
            self._act()
        self.guard.at(self.step, self.data_step)
        asked, last = float(result.asked), self.step >= self.cfg.train.steps
        stop = asked >= STOP
        self._save(loss, final=stop or last, forced=stop, due=asked % STOP > 0)
        if stop and not last:
            self.stopped = f"asked to stop at step {self.step}; it is saved in {self.folder.root}"
            self.drain.mark()
        self.over = stop or last

    def _act(self) -> None:
        """An update was turned down: say so with its batch, end the run, or go back before it."""
        bad = self.guard.last
        assert bad is not None
        assert self._saver is not None
        samples = self.source.samples(bad.data_step, range(self.cfg.train.global_batch)).tolist()
        self.guard.record(samples)
        try:
            self.guard.check()
        except UserError:
            with suppress(UserError):  # every rank ends here: what is being saved, and what is known of it, stays
                self._saver.wait()
            raise
        back = bad.action == "rollback" and self._roll_back()
        done = (
            f"back to step {self.step}, and on with batch {self.data_step}"
            if back
            else "its update is skipped"
        )
        self._warn(f"step {bad.step}: {bad.reason}; {done}")

    def _roll_back(self) -> bool:
        """State, step and history of the newest good checkpoint; the data goes on. False: there is none."""
        assert self._saver is not None
        with self._pause("rollback"):
            self._saver.wait()
            found = find(self.folder, "auto", self.ranks, restarted=True) if self._saver.last_step else None
            if found is not None:
                self._restore(found)
                self.step = found.manifest.step
        return found is not None

    def _save(self, loss: float, *, final: bool, forced: bool, due: bool) -> None:
        assert self._saver is not None
        every, memory_every = self.cfg.checkpoint.every, self.cfg.checkpoint.memory_every
        disk = forced or due or bool(every and self.step % every == 0) or (final and self.cfg.saves)
        disk = disk and self._saver.last_step != self.step
        # After a skipped step the weights are those of the copy before, which may have been proven.
        memory = bool(memory_every and self.step % memory_every == 0 and not final and not self._skipped)
        if disk:
            self._saved_at = self._clock()
        if disk or memory:
            progress = Progress(
                self.step, self.data_step, self._engine.updates, loss, list(self.guard.losses), self._skipped,
                self.source.first_sample(self.data_step),
            )  # fmt: skip
            with self._pause("checkpoint"):
                # Else a rank that is killed right after the save leaves a hole: the next attempt begins behind steps
                # that nobody has a record of.
                self._recorder.drain()
                self._saver.save(progress, disk=disk, memory=memory)
        if final:
            with self._pause("checkpoint"):
                self._saver.wait()
        if self._saver.saved:
            self.drain.saved_step = self._saver.saved[-1].step

    def _restore(self, found: Found) -> None:
        with self._patient():
            load(found, self._engine, self.ranks)
        self.guard.resume(found.manifest.recent_losses)
        assert self._saver is not None
        self._saver.went_back(found.manifest.step, found.path)
        self._skipped = 0
        for note in found.notes:
            self._warn(note)

    @contextmanager
    def _pause(self, kind: str) -> Iterator[None]:
        with self._recorder.stall(kind), self._patient(self._longest_save() if kind == "checkpoint" else None):
            yield

    def _patient(self, limit_s: float | None = None) -> AbstractContextManager[None]:
        limit = self.cfg.resilience.setup_timeout_s
        return nullcontext() if self._dog is None else self._dog.patient(min(limit, limit_s or limit))

    def _longest_save(self) -> float | None:
        """Seconds after which a save hangs, by those that are done; None: there is none yet. So a rank that is stopped
        while it saves is missed after minutes, not after all of the time that set-up may take."""
        assert self._saver is not None
        return max((_SLOWER * saved.seconds for saved in self._saver.saved), default=None)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._dog is not None:
            self._dog.stop()
        if self._saver is not None:
            self._saver.close(abandon=error is not None)
        if self._memory is not None and error is None and not self.stopped:
            self._memory.clear()
