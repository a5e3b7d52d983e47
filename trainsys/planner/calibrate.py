"""Fit the planner's constants to measured runs: regularised, robust least squares on the log of step time.

Each constant starts at its prior and is pulled back to it, so few runs move few constants and an unseen machine
falls back to the literature. The data term is Huber's loss of log(predicted/measured), each source weighted
by the cube root of its rows rather than by all of them, so that one large sweep does not drown the others. Each site
(one source's software on one device at one precision) may also be faster or slower as a whole, a random effect that is
then not held against a constant that only this site exercises.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from trainsys.errors import UserError
from trainsys.planner.cases import Array, Cases
from trainsys.planner.constants import PRIORS, Constants, from_priors
from trainsys.planner.fill import at_best, fill
from trainsys.planner.from_runs import build
from trainsys.planner.least_squares import levenberg
from trainsys.planner.memory import peak_memory
from trainsys.planner.memory_constants import MEMORY_PRIORS, MemoryConstants, memory_from_priors
from trainsys.planner.runs_csv import Run, read
from trainsys.planner.step_time import step_time

# Errors in log that balance data against priors: of a good prediction of others' runs, whose rows share their source's
# peculiarities, and of runs of one machine; of a site as a whole. Chosen by leaving sources out.
NOISE, NOISE_ONE_MACHINE, SITE = 0.10, 0.05, 0.10


def row_weights(sources: Sequence[str]) -> Array:
    """(10 / rows of the source)^(2/3), at most 1: a source counts with the cube root of its rows."""
    names, inverse, counts = np.unique(np.asarray(sources), return_inverse=True, return_counts=True)
    assert len(names) > 0
    out: Array = np.minimum(1.0, (10.0 / counts[inverse]) ** (2.0 / 3.0))
    return out


def thin(
    index: NDArray[np.int64], sources: Sequence[str], most: int = 250
) -> tuple[NDArray[np.int64], Array]:
    """(every n-th row of a source with more than ``most``, how many rows each stands for): a sweep's neighbours say
    much the same, and the fit takes time in proportion to rows."""
    names = np.asarray(sources)[index]
    kept, stands = [], []
    for name in np.unique(names):
        mine = index[names == name]
        stride = -(-len(mine) // most)
        kept.append(mine[::stride])
        stands.append(np.full(len(kept[-1]), float(stride)))
    order = np.argsort(np.concatenate(kept), kind="stable")
    return np.concatenate(kept)[order], np.concatenate(stands)[order]


def fit(
    cases: Cases,
    measured_s: Array,
    weights: Array,
    *,
    start: Constants | None = None,
    only: Sequence[str] | None = None,
    sites: Sequence[str] | None = None,
) -> Constants:
    """Constants that best explain ``measured_s`` (seconds, all finite) of ``cases``.

    ``only`` limits which constants move (an anchor of one run moves few); the others stay at ``start``. With
    ``sites`` of the rows each has a factor of its own, which is forgotten; without, all are of one machine.
    """
    base = start or from_priors()
    names = list(only) if only is not None else list(PRIORS)
    mean = (
        np.log([PRIORS[n].value for n in names])
        if start is None
        else np.log([getattr(base, n) for n in names])
    )
    sd = np.array([PRIORS[n].log_sd for n in names])
    log_y = np.log(measured_s)
    root_w = np.sqrt(weights) / (NOISE_ONE_MACHINE if sites is None else NOISE)
    _, of = np.unique(np.asarray(sites or ()), return_inverse=True)
    factors_n = int(of.max()) + 1 if len(of) else 0
    known: tuple[Array, Array] | None = None

    def predicted(x: Array) -> Array:
        """Predictions, cached for the last constants: a derivative by a site's factor does not change them."""
        nonlocal known
        if known is None or not np.array_equal(known[0], x):
            k = replace(base, **{n: float(v) for n, v in zip(names, np.exp(x), strict=True)})
            known = x.copy(), np.log(np.broadcast_to(step_time(cases, k).total, log_y.shape))
        return known[1]

    def residual(x: Array) -> Array:
        constants, factors = x[: len(names)], x[len(names) :]
        e = predicted(constants) - log_y
        e = (e + factors[of] if factors_n else e) * root_w
        return np.concatenate([e, (constants - mean) / sd, factors / SITE])

    x = levenberg(residual, np.concatenate([mean, np.zeros(factors_n)]), len(log_y))[: len(names)]
    return replace(base, **{n: float(v) for n, v in zip(names, np.exp(x), strict=True)})


def fit_runs(runs: Sequence[Run]) -> tuple[Constants, MemoryConstants]:
    """Both sets of constants from all rows that ran, or are known to have run out of memory.

    What rows leave out depends on the constants and they on it: memory is fitted from the priors' choice, then time,
    then memory again.
    """
    cases, kept, _ = build(runs)
    if cases is None:
        raise UserError("no row of the table can be used to calibrate")
    sources = [r.source for r in kept]
    seconds = np.asarray([r.step_s for r in kept])
    oom = np.asarray([r.oom for r in kept], float)
    peak = np.asarray([np.nan if r.oom else r.n("peak_mem_gb") for r in kept]) * 1e9
    peak = np.where(np.asarray(["memory_only" in r.text["quality"] for r in kept]), np.nan, peak)
    noisy = np.asarray([r.text["quality"] not in ("", "ok", "derived_step_time") for r in kept])
    weights = row_weights(sources) * np.where(noisy, 0.1, 1.0)
    timed, repeat = thin(np.flatnonzero(np.isfinite(seconds)), sources)
    sized = np.flatnonzero(np.isfinite(seconds) | (oom > 0) | np.isfinite(peak))
    k, m = from_priors(), memory_from_priors()
    for _ in range(2):
        full = fill(cases, kept, k, m)
        least = at_best(full, kept)
        m = fit_memory(least.take(sized), peak[sized], oom[sized], weights[sized])
        full = fill(cases, kept, k, m)
        low = np.broadcast_to(full.fp8 > 0, seconds.shape)
        sites = [f"{sources[i]}, {kept[i].text['gpu']}, {low[i]}" for i in timed]
        k = fit(full.take(timed), seconds[timed], weights[timed] * repeat, sites=sites)
    return k, m


def leave_one_out(runs: Sequence[Run]) -> dict[str, tuple[Constants, MemoryConstants]]:
    """Constants for each source, fitted without any of its rows."""
    names = sorted({r.source for r in runs})
    return {name: fit_runs([r for r in runs if r.source != name]) for name in names}


def fit_memory(cases: Cases, measured: Array, oom: Array, weights: Array) -> MemoryConstants:
    """Memory constants from measured peaks (bytes, NaN where unknown) and from which rows ran out of memory.

    A row with a peak pulls on its logarithm. A row known only to fit or not pulls, one-sidedly, once the
    prediction is on the wrong side of the device's usable memory.
    """
    names = list(MEMORY_PRIORS)
    mean = np.log([MEMORY_PRIORS[n].value for n in names])
    sd = np.array([MEMORY_PRIORS[n].log_sd for n in names])
    known = np.isfinite(measured)
    log_y = np.log(np.where(known, measured, 1.0))
    root_w = np.sqrt(weights)

    def residual(x: Array) -> Array:
        m = MemoryConstants(**{n: float(v) for n, v in zip(names, np.exp(x), strict=True)})
        total = peak_memory(cases, m).total
        e = np.where(known, np.log(total) - log_y, 0.0) / 0.08
        over = np.log(total / (m.usable * cases.mem_bytes))
        wrong = np.where(oom > 0, np.maximum(0.01 - over, 0.0), np.maximum(over + 0.01, 0.0)) / 0.04
        wrong = np.where(known, 0.0, np.minimum(wrong, 4.0))
        return np.concatenate([e * root_w, wrong * root_w, (x - mean) / sd])

    x = levenberg(residual, mean, len(log_y))
    return MemoryConstants(**{n: float(v) for n, v in zip(names, np.exp(x), strict=True)})


def left_out_errors(runs: Sequence[Run]) -> dict[str, float]:
    """Mean error of step time, percent, on a source that the constants have not seen, by kind of run; empty of a
    single source, which nothing else can predict."""
    from trainsys.planner.backtest import predict, report

    if len({r.source for r in runs}) < 2:
        return {}
    kinds = report(predict(runs, "none", leave_one_out(runs)), "none", ())["slices"]
    errors = {name: s["mape_mean_of_sources_pct"] for name, s in kinds.items()}
    return {name: round(float(e), 1) for name, e in errors.items() if e is not None}


def save(
    path: str | Path, runs: Sequence[Run], k: Constants, m: MemoryConstants, errors: dict[str, float]
) -> None:
    """Write the shipped file: values to four digits, which sources (with rows) they were fitted to, and what error to
    expect on others."""

    def rounded(values: Constants | MemoryConstants) -> dict[str, float]:
        return {n: float(f"{v:.4g}") for n, v in asdict(values).items()}

    counts = Counter(r.source for r in runs)
    text = (
        "# Fitted by `python -m trainsys.planner.calibrate TABLE.csv`; meanings and priors: constants.py and\n"
        "# memory_constants.py. fitted_on: rows of each source of that table. error_pct: mean error on a source that\n"
        "# the constants were not fitted to, by kind of run.\n"
    )
    body = {
        "fitted_on": dict(sorted(counts.items())),
        "error_pct": errors,
        "time": rounded(k),
        "memory": rounded(m),
    }
    Path(path).write_text(text + yaml.safe_dump(body, sort_keys=False), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m trainsys.planner.calibrate TABLE.csv [OUT.yaml]``."""
    args = list(sys.argv[1:] if argv is None else argv)
    runs = read(args[0])
    k, m = fit_runs(runs)
    save(
        args[1] if len(args) > 1 else Path(__file__).parent / "constants.yaml", runs, k, m, left_out_errors(runs)
    )


if __name__ == "__main__":
    main()
