"""The newest metrics as a text page for Prometheus to scrape: ``http://HOST:PORT/metrics``.

Format: the Prometheus text exposition format, version 0.0.4. Names are ``trainsys_<section>_<name>``.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from trainsys.rank_lists import rank_numbers
from trainsys.telemetry.events import Finding
from trainsys.telemetry.sinks.base import RunInfo

MOST_OPEN = 32


class PrometheusSink:
    """Serves from a thread until the run ends. ``port`` 0 takes a free one (``self.port`` tells which)."""

    name = "prometheus"

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.port = port
        self._host = host
        self._newest: tuple[int, Mapping[str, float]] | None = None
        self._labels = ""
        self._open: dict[str, tuple[str, float]] = {}
        """Labels and seconds per step of each open finding, by what makes it the same one in the next news of it."""
        self._server: ThreadingHTTPServer | None = None

    def start(self, info: RunInfo) -> None:
        self._labels = f'{{run="{_escape(info.lineage or info.run_id)}",name="{_escape(info.name)}"}}'
        sink = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                if self.path.partition("?")[0] not in ("/", "/metrics"):
                    self.send_error(404)
                    return
                page = sink._page()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(page)))
                self.end_headers()
                self.wfile.write(page)

            def log_message(self, format: str, *args: Any) -> None:
                """Scrapes are not the user's concern."""

        self._server = ThreadingHTTPServer((self._host, self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, name="trainsys-prometheus", daemon=True).start()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._newest = step, metrics

    def _page(self) -> bytes:
        """Written when it is asked for, which steps are more often than scrapers."""
        if self._newest is None:
            return b""
        step, metrics = self._newest
        lines = []
        for name, value in (("step", float(step)), *metrics.items()):
            metric = "trainsys_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
            lines.append(f"# TYPE {metric} gauge\n{metric}{self._labels} {_number(value)}\n")
        if self._open:
            lines.append("# TYPE trainsys_finding_cost_seconds gauge\n")
        for labels, cost in self._open.values():
            lines.append(f"trainsys_finding_cost_seconds{self._labels[:-1]}{labels}}} {_number(cost)}\n")
        return "".join(lines).encode()

    def finding(self, finding: Finding) -> None:
        """One gauge a finding that is open; at most ``MOST_OPEN``, so that labels stay few."""
        told = {"kind": finding.kind, "ranks": rank_numbers(finding.ranks), "phase": finding.phase}
        key = "".join(f',{name}="{_escape(value)}"' for name, value in told.items())
        if finding.until is not None:
            self._open = {known: shown for known, shown in self._open.items() if known != key}
        elif key in self._open or len(self._open) < MOST_OPEN:
            # Its cause may be known only later, or change: that is no other finding.
            self._open = {**self._open, key: (f'{key},cause="{_escape(finding.cause)}"', finding.cost_s)}

    def message(self, level: str, text: str) -> None:
        """Prometheus holds numbers only."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


def _number(value: float) -> str:
    return {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}.get(str(value), repr(value))


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
