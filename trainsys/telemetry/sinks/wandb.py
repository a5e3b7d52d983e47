"""Weights & Biases: online, offline, and offline by itself when the server cannot be reached."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import msgspec

from trainsys.config.run import WandbConfig
from trainsys.telemetry.events import Finding
from trainsys.telemetry.metrics import SECTIONS, finding_metrics
from trainsys.telemetry.sinks.base import RunInfo

SUMMARY = {
    "train/loss": "min",
    "train/grad_norm": "last",
    "perf/mfu": "mean",
    "perf/tokens_per_s": "mean",
    "perf/step_time_s": "mean",
    "memory/peak_gib": "max",
}
"""How a metric is summed up in W&B's run table; the others: by their last value."""


SETTLED = {f"perf/{name}": name for name in ("mfu", "mfu_palm", "hfu", "step_time_s", "tokens_per_s")}
"""Metrics of which the run's own summary has the last word: without warm-up, of the peak as known at the end."""


TABLES = ("waterfall", "verdicts")
"""Keys of the summary that are rows, and become tables."""


ROWS_A_STEP = 4
"""W&B's own count of rows, at which an offline attempt begins so many times its first step: past those of the attempts
before, which log a row a step and few others, so that sent one after the other none lies over another."""


FINDINGS = 100
"""Rows of the table of findings: the latest."""


class WandbSink:
    """One W&B run, for rank 0: over all attempts of ours, which share its id.

    ``init`` and ``finish`` each wait for the server no longer than ``config.timeout_s``; a run that cannot be
    opened online is opened offline in the run's folder and can be sent later with ``wandb sync``.
    """

    name = "wandb"

    def __init__(self, config: WandbConfig, say: Callable[[str], None] | None = None) -> None:
        self._config = config
        self._say = say or (lambda text: None)
        self._wandb: Any = None
        self._run: Any = None
        self._row: int | None = None
        self._findings: list[dict[str, Any]] = []

    def start(self, info: RunInfo) -> None:
        # W&B's own error reporting waits for the server when the process ends, offline runs included: 10 s
        # and more where it never answers. Read at import; a user's own choice stands.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._wandb = import_module("wandb")
        if self._config.mode == "online":
            try:
                self._probe()
                self._run = self._open(info, "online")
            except (self._wandb.errors.Error, OSError) as error:
                reason = " ".join(str(error).split())[:160]
                self._say(f"wandb: cannot log online: {reason}; going on offline")
                self._wandb.teardown(1)  # W&B's service holds the run's id for the attempt that failed
        if self._run is None:
            self._run = self._open(info, "offline")
        if self._run.offline:
            self._row = ROWS_A_STEP * info.first_step
            self._say(f"wandb: offline run; send it later with: wandb sync {os.path.dirname(self._run.dir)}")
        self._run.define_metric("step", hidden=True)
        for section in (*SECTIONS, "waterfall", "blame"):
            self._run.define_metric(f"{section}/*", step_metric="step")
        for metric, how in SUMMARY.items():
            self._run.define_metric(metric, step_metric="step", summary=how)

    def _probe(self) -> None:
        """Raises ``OSError`` unless something speaks HTTP at the server's address.

        Asked first because an ``init`` that fails leaves W&B's service retrying, which holds up the exit of
        the process long after the run has gone on offline.
        """
        url = self._wandb.setup().settings.base_url
        try:
            urllib.request.urlopen(url, timeout=self._config.timeout_s).close()
        except urllib.error.HTTPError:
            pass  # it answered, if only to say no
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise OSError(f"no answer from {url} within {self._config.timeout_s:g} s ({error})") from None

    def _open(self, info: RunInfo, mode: str) -> Any:
        wait_s = max(1, round(self._config.timeout_s))
        settings = self._wandb.Settings(
            init_timeout=wait_s,
            login_timeout=wait_s,
            finish_timeout=wait_s,
            x_graphql_timeout_seconds=wait_s,
            console="off",
            silent=True,
            **({} if info.pid is None else {"x_stats_pid": info.pid}),
        )
        return self._wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            group=self._config.group,
            name=info.name,
            id=info.lineage or info.run_id,
            resume="allow",
            config=dict(info.config),
            tags=list(info.tags) or None,
            dir=str(info.run_dir),
            mode=mode,
            settings=settings,
        )

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        row, self._row = self._row, None
        self._run.log({"step": step, **metrics}, step=row, commit=True)

    def finding(self, finding: Finding) -> None:
        """A curve of what it costs, and a row of the table ``findings``, which is logged whole each time."""
        self._findings = [*self._findings, msgspec.structs.asdict(finding)][-FINDINGS:]
        self.step(finding.step, {**finding_metrics(finding), "findings": self._table(self._findings)})

    def message(self, level: str, text: str) -> None:
        """Messages are in the event file; a W&B alert would send mail."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        if self._run is None:
            return
        scalars = dict(summary)
        tables = {name: rows for name in TABLES if (rows := scalars.pop(name, None))}
        if tables:
            self._run.log({name: self._table(rows) for name, rows in tables.items()})
        for metric, name in SETTLED.items():
            if (value := scalars.get(name)) is not None:
                scalars[metric] = {SUMMARY[metric]: value} if metric in SUMMARY else value
        self._run.summary.update(scalars)
        self._run.finish(exit_code=int(summary.get("status") in ("failed", "killed")))

    def _table(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Rows of equal keys as a W&B table; a list in a cell becomes text."""
        columns = list(rows[0])
        data = [[", ".join(map(str, v)) if isinstance(v := row[c], list) else v for c in columns] for row in rows]
        return self._wandb.Table(columns=columns, data=data)
