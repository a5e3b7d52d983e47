"""``trainsys trace``: files in, one report out, in as many forms as asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainsys.errors import UserError
from trainsys.profiler.trace.analyse import Analysed, Loaded, Options, analyse_file, load, waits_of
from trainsys.profiler.trace.commlist import CommList
from trainsys.profiler.trace.critical import critical_path
from trainsys.profiler.trace.kinds import Inputs, sort_inputs
from trainsys.profiler.trace.lanes import timeline_of
from trainsys.profiler.trace.report import Report, Unread, to_json
from trainsys.profiler.trace.source import Limits
from trainsys.profiler.trace.text import render
from trainsys.profiler.trace.verdicts import judge
from trainsys.profiler.trace.windows import place
from trainsys.terminal_text import columns

if TYPE_CHECKING:
    from trainsys.config.model import ModelConfig


def analyse(
    paths: list[str | Path],
    *,
    workers: int | None = None,
    options: Options | None = None,
    critical: bool = True,
    device: str | None = None,
    model: ModelConfig | None = None,
    seq_len: int | None = None,
    tokens_per_step: int | None = None,
    timeline: bool = False,
) -> Report:
    """The report over files and folders; see :func:`run` for the arguments. ``timeline``: with one, as pages have it.

    One file that cannot be read does not lose the others: it is listed in ``Report.unread``. Raises
    UserError if nothing can be read at all.
    """
    options = options or Options()
    inputs = sort_inputs(paths)
    if timeline:
        options = replace(options, timeline_of=len(inputs.traces))
    report = Report(unread=[Unread(str(p), why) for p, why in inputs.unread])
    found: list[Analysed] = []
    # A file that is alone needs no second reading for its critical path; the columns of many would add up.
    kept: dict[int | None, Loaded] | None = {} if critical and len(inputs.traces) == 1 else None
    for result in _each(inputs.traces, options, workers, kept):
        if isinstance(result, Unread):
            report.unread.append(result)
        else:
            found.append(result)
    placed = place(found)
    report.unread += placed.unread
    # The catalogue is imported after the workers are done: it would be copied into each of them.
    from trainsys.profiler.trace.rates import add_model_mfu, add_peaks, common_device

    for capture in placed.captures:
        for r in (capture.report, *capture.lanes):
            r.rank, r.window = capture.report.rank, capture.report.window
            add_peaks(r, capture.device_memory, device)
            report.ranks.append(r)
    hosts = {c.report.rank: c.report.host for c in placed.captures}
    waits: dict[int, dict[int, int]] = {}
    if len(hosts) > 1:
        from trainsys.profiler.trace.across import compare_ranks, waits_by_start
        from trainsys.profiler.trace.matching import match

        windows = [match(comms, hosts) for comms in _windows(placed.captures)]
        report.across = compare_ranks(windows, hosts, common_device(report))
        waits = waits_by_start(windows) if critical else {}
    if timeline:
        report.timeline = timeline_of(report, placed.captures)
    if critical and report.ranks:
        _critical(report, options, waits, kept or {})
    _others(inputs, report)
    _timelines(inputs, report)
    if not (report.ranks or report.hang or report.memory or report.timelines):
        raise UserError(_nothing(paths, report))
    if model is not None:
        if seq_len is None or tokens_per_step is None:
            raise UserError(
                "MFU by a model needs its sequence length and tokens per step: give --seq-len and --tokens-per-step"
            )
        add_model_mfu(report, model, seq_len, tokens_per_step)
    report.verdicts = judge(report)
    return report


def run(
    paths: list[str | Path],
    json: str | Path | None = None,
    html: str | Path | None = None,
    perfetto: str | Path | None = None,
    model: ModelConfig | None = None,
    *,
    seq_len: int | None = None,
    tokens_per_step: int | None = None,
    device: str | None = None,
    against: list[str | Path] | None = None,
    workers: int | None = None,
    keep_truncated: bool = False,
    max_bytes: int | None = None,
    critical: bool = True,
) -> str:
    """Analyse traces, flight-recorder dumps and memory snapshots; return the text for the terminal.

    Args:
        paths: files or folders, kinds recognised by content.
        json, html, perfetto: files to write: the report, a self-contained page, an annotated timeline
            (gzip if named ``.gz``).
        model, seq_len, tokens_per_step: shape of the model, tokens of a sequence, and tokens all the
            world's ranks trained in a step: for MFU by the model's FLOPs. All three or none.
        device: catalogue name, where the trace's own device name is missing or wrong.
        against: the same for a second run, to say what got slower since (``paths`` is the newer one).
        workers: processes; None: one a core, at most one a file.
        keep_truncated: read the whole events of files that were cut off.
        max_bytes: refuse files larger than this once decompressed.

    Raises:
        UserError: nothing could be read, or options that do not fit; one line.
    """
    limits = Limits(total_bytes=max_bytes) if max_bytes is not None else None
    options = Options(limits, keep_truncated)
    report = analyse(
        paths,
        workers=workers,
        options=options,
        critical=critical,
        device=device,
        model=model,
        seq_len=seq_len,
        tokens_per_step=tokens_per_step,
        timeline=html is not None,
    )
    width = columns()
    text = render(report, width)
    diff = None
    if against:
        from trainsys.profiler.trace.diff import compare_runs, render_diff

        diff = compare_runs(analyse(against, workers=workers, options=options, critical=False), report)
        text += "\n" + render_diff(diff, width)
    if json:
        _write(Path(json), to_json(report))
    if html:
        from trainsys.profiler.trace.page import page

        _write(Path(html), page(report, diff).encode())
    if perfetto:
        from trainsys.profiler.trace.annotate import write_annotated

        write_annotated(report, Path(perfetto), options)
    return text


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def _one(job: tuple[Path, Options], keep: dict[int | None, Loaded] | None = None) -> Analysed | Unread:
    path, options = job
    try:
        return analyse_file(path, options, keep)
    except UserError as error:
        return Unread(str(path), str(error))


def _each(
    traces: list[Path], options: Options, workers: int | None, keep: dict[int | None, Loaded] | None
) -> Iterator[Analysed | Unread]:
    """Results in the files' order. Each file is read, reduced and dropped in its worker, so memory does not
    grow with their number. ``keep`` takes the columns of the only one."""
    jobs = [(path, options) for path in traces]
    n = min(workers or os.cpu_count() or 1, len(jobs))
    if n <= 1:
        for job in jobs:
            yield _one(job, keep)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    with ProcessPoolExecutor(n, multiprocessing.get_context(method)) as pool:
        yield from pool.map(_one, jobs)


def _windows(captures: list[Analysed]) -> list[dict[int, CommList]]:
    """The ranks' communications by captured stretch of time."""
    out: dict[int, dict[int, CommList]] = {}
    for c in captures:
        out.setdefault(c.report.window, {})[c.report.rank] = c.comms
    return [out[w] for w in sorted(out)]


def _critical(
    report: Report, options: Options, waits: dict[int, dict[int, int]], kept: dict[int | None, Loaded]
) -> None:
    """Find the slowest rank's critical path; a faster rank's path ends in waiting for it."""
    timed = [r for r in report.ranks if r.breakdown is not None and r.trusted("idle")]
    if not timed:
        return
    slowest = max(
        timed, key=lambda r: r.breakdown.whole.span - r.breakdown.whole.comm_exposed if r.breakdown else 0
    )
    loaded = kept.get(slowest.lane) or load(Path(slowest.path), options, slowest.lane)
    report.critical = critical_path(
        loaded.trace, loaded.kinds, loaded.launches, waits_of(loaded, waits.get(slowest.rank, {}))
    )
    report.critical_rank = slowest.rank if report.critical else None


def _others(inputs: Inputs, report: Report) -> None:
    if inputs.dumps:
        from trainsys.profiler.hang import analyse_dumps

        try:
            report.hang = analyse_dumps(inputs.dumps)
        except UserError as error:
            report.unread.append(Unread(str(inputs.dumps[0]), str(error)))
    for path in inputs.snapshots:
        from trainsys.profiler.memory_snapshot import analyse_snapshot

        try:
            report.memory += analyse_snapshot(path)
        except UserError as error:
            report.unread.append(Unread(str(path), str(error)))


def _timelines(inputs: Inputs, report: Report) -> None:
    for path in inputs.timelines:
        from trainsys.profiler.trace.optimeline import analyse_timeline

        try:
            report.timelines.append(analyse_timeline(path))
        except UserError as error:
            report.unread.append(Unread(str(path), str(error)))


def _nothing(paths: list[str | Path], report: Report) -> str:
    if report.unread:
        more = f" (and {len(report.unread) - 1} more files)" if len(report.unread) > 1 else ""
        return report.unread[0].why + more
    return f"{', '.join(map(str, paths))}: no trace, flight-recorder dump or memory snapshot in it"
