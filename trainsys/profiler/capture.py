"""A profiler capture of one step, now and then: what phase timers cannot tell apart. The only torch in here.

All ranks capture the same step. What starting, stopping and reading the capture take is recorded as the stall
``capture``; the captured step and the one after it count in no mean.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from trainsys.errors import UserError
from trainsys.profiler.steps import CAPTURE, Capture
from trainsys.profiler.trace.analyse import Options, analyse_file
from trainsys.telemetry.events import Step
from trainsys.telemetry.recorder import Recorder

FIRST = 10
"""Steps before the first capture: caches are warm then. A shorter interval moves it forward."""
_COMPUTE = ("forward", "backward", "recompute")


class StepCapture:
    """Captures a step of every ``every`` (0: none). ``before`` each step and ``after`` it, on the step's thread.

    The trace stays as ``RUN/captures/step_S_rank_R.json.gz``, for ``trainsys trace``; its shares go to the event
    file. A capture that fails is told to the user once, and there are no more.
    """

    def __init__(self, recorder: Recorder, run_dir: str | Path, every: int) -> None:
        self._recorder, self._every = recorder, every
        self._folder = Path(run_dir) / "captures"
        self._profile: profile | None = None

    def due(self, step: int) -> bool:
        return self._every > 0 and step % self._every == min(FIRST, self._every - 1)

    def before(self, step: int) -> None:
        """Step ``step`` begins next."""
        if not self.due(step):
            return
        with self._recorder.stall("capture"):
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, record_shapes=True, acc_events=False)
            self._profile.start()

    def after(self, record: Step) -> Capture | None:
        """That step has ended, and this is its record; what a capture of it shows, if there is one."""
        if self._profile is None:
            return None
        with self._recorder.stall("capture"), ExitStack() as stack:
            stack.callback(setattr, self, "_profile", None)
            try:
                self._profile.stop()
                self._folder.mkdir(parents=True, exist_ok=True)
                path = self._folder / f"step_{record.step:07d}_rank_{self._recorder.info.rank:05d}.json.gz"
                self._profile.export_chrome_trace(str(path))
                found = shares(path, record)
                self._recorder.metrics(record.step, found)
                return Capture(
                    record.step, self._recorder.info.rank, found[CAPTURE + "matmul"], found[CAPTURE + "idle"]
                )
            except (UserError, OSError, RuntimeError) as error:
                self._every = 0
                self._recorder.message("warning", f"no more profiler captures: {error}")
        return None


def shares(path: Path, record: Step) -> dict[str, float]:
    """``capture/matmul`` and ``capture/idle``: shares (0..1) of the step's own compute time.

    On a device compute time is kernels and the gaps that the host causes; on CPU, where there is no queue to run
    dry, it is forward and backward as the recorder timed them. Raises UserError for a trace that cannot be read.
    """
    breakdown = analyse_file(path, Options()).report.breakdown
    if breakdown is None:
        raise UserError(f"{path}: nothing in it was timed")
    whole = breakdown.whole
    on_device = whole.idle_by_cause and torch.cuda.is_available()
    if on_device:
        gaps = sum(whole.idle_by_cause.get(cause, 0) for cause in ("host", "launch", "sync"))
        total = max(1, whole.matmul + whole.other_compute + gaps)
        return {CAPTURE + "matmul": whole.matmul / total, CAPTURE + "idle": gaps / total}
    compute_s = sum(record.phases.get(name, 0.0) for name in _COMPUTE)
    share = whole.matmul / 1e9 / compute_s if compute_s > 0 else 0.0
    return {CAPTURE + "matmul": min(1.0, share), CAPTURE + "idle": 0.0}
