"""Imbalance that is nobody's fault: rows of unequal cost, and stages of unequal size.

A slow device is slow for every micro-batch alike. Rows of unequal length make a rank's own micro-batches differ,
and do so in forward and backward together (Lin et al. 2025, "Understanding Stragglers in Large Model Training
Using What-if Analysis", section 5.3: forward-backward correlation of 0.9 and above).
"""

from __future__ import annotations

import numpy as np

from trainsys.profiler.expected import StageWork
from trainsys.profiler.steps import Floats, Pairs, StepTable
from trainsys.profiler.straggler import find_stragglers
from trainsys.profiler.verdict import Verdict, ended

CORRELATION = 0.9
VARIATION = 0.08
"""Within-rank variation (standard deviation over mean) of micro-batch times that is more than noise."""
LEAST_WAIT = 0.03
MIN_PAIRS = 12
LEAST_VARIANCE = 1e-12
"""Below it is rounding."""
ENOUGH = 256
"""Ranks whose micro-batches tell a correlation; of more, some are taken."""


def forward_backward(table: StepTable) -> tuple[float, float, int]:
    """(correlation of forward with backward within ranks, within-rank variation, pairs).

    Pairs are micro-batches, or whole steps where a step has one micro-batch.
    """
    some = range(0, len(table.ranks), max(1, len(table.ranks) // ENOUGH))
    pairs = [table.micro[table.ranks[i]] for i in some if table.ranks[i] in table.micro]
    if not pairs and {"forward", "backward"} <= table.phases.keys():
        # Beside the step's median over ranks: a machine that is slow for all for a while is no row's length.
        beside = [_beside_median(table.phases[name]) for name in ("forward", "backward")]
        for i in some:
            pairs.append(Pairs())
            pairs[-1].add(beside[0][:, i], beside[1][:, i])
    pairs = [p for p in pairs if p.count >= 3 and p.forward > 0 and p.backward > 0]
    count = sum(p.count for p in pairs)
    if not count:
        return 0.0, 0.0, 0
    # Of each rank relative to its own mean; so the means are 0 over all of them.
    forward = sum(p.forward_squares / (p.forward / p.count) ** 2 - p.count for p in pairs) / count
    backward = sum(p.backward_squares / (p.backward / p.count) ** 2 - p.count for p in pairs) / count
    both = sum(p.products / (p.forward / p.count) / (p.backward / p.count) - p.count for p in pairs) / count
    spread = float(np.sqrt(max(0.0, forward)))
    if min(forward, backward) < LEAST_VARIANCE:
        return 0.0, spread, count
    return float(both / np.sqrt(forward * backward)), spread, count


def _beside_median(seconds: Floats) -> Floats:
    """[T, R], each step relative to its median; that is the usual one's."""
    middle = np.median(seconds, axis=1, keepdims=True)
    return np.asarray(seconds / np.maximum(middle, 1e-9) * float(np.median(middle)))


def sequence_imbalance(table: StepTable, work: Floats, step_s: float) -> list[Verdict]:
    """Ranks are late by turns, because of what is in their rows."""
    late = work.max(axis=1) - np.median(work, axis=1)
    cost = float(late.mean())
    if cost < LEAST_WAIT * step_s:
        return []
    correlation, variation, pairs = forward_backward(table)
    if pairs < MIN_PAIRS or correlation < CORRELATION or variation < VARIATION:
        return []
    return [Verdict(
        "sequence", "rows of unequal length: a different rank is late in each step, by what is in its rows",
        f"forward and backward of a micro-batch vary together (correlation {correlation:.2f}, variation "
        f"{100 * variation:.0f}% within a rank); a slow device would be slow for all alike",
        "balance rows over ranks by attention cost, or shorten the longest documents",
        cost, cost / step_s, (), "compute", int(table.steps[0]),
    )]  # fmt: skip


def _uneven(
    table: StepTable, known: StageWork, by_stage: Floats, alpha: float, step_s: float
) -> list[Verdict]:
    """A stage that is late by its FLOPs alone; the rest as fast as the FLOPs say."""
    out = []
    for s in find_stragglers(by_stage, alpha=alpha, min_effect=0.05)[:1]:
        others = np.delete(by_stage, s.index, axis=1)
        cost = float(np.median(by_stage[:, s.index] - others.max(axis=1)))
        if cost < 0.02 * step_s:
            continue
        head = " and the head" if s.index == len(known.layers) - 1 else ""
        out.append(Verdict(
            "stage", f"stage {s.index} has more to do by design: {known.layers[s.index]} layers{head}, "
            f"{known.share[s.index]:.2f} times the mean stage's FLOPs",
            f"layers by stage: {', '.join(map(str, known.layers))}; per FLOP it is as fast as the others",
            "the cut is the most even there is: change parallel.pp or model.n_layers, or hold several stages a rank "
            "(parallel.pipeline.schedule: interleaved_1f1b)",
            cost, cost / step_s, (), f"stage {s.index}", int(table.steps[s.since]), ended(table, s),
        ))  # fmt: skip
    return out


def stage_imbalance(table: StepTable, work: Floats, alpha: float, step_s: float) -> list[Verdict]:
    """A pipeline stage all of whose ranks work longer than those of other stages."""
    stages = table.layout.pp
    peers = table.peers()
    if stages < 2 or len(np.unique(peers)) < stages:
        return []
    # By its lower quartile: one slow rank of two is no slow stage.
    by_stage = np.stack(
        [np.quantile(work[:, peers == s], 0.25, axis=1, method="lower") for s in range(stages)], axis=1
    )
    known = table.stages
    # Per FLOP, where it is known how many each stage has; what is still slow then is no design.
    per_flop = by_stage if known is None else by_stage / known.share
    out = []
    for s in find_stragglers(per_flop, alpha=alpha, min_effect=0.05)[:1]:
        rest = np.delete(by_stage, s.index, axis=1)
        when = slice(s.since, s.until)
        cost = float(np.median((by_stage[:, s.index] - rest.max(axis=1))[when]))
        if cost < 0.02 * step_s:
            continue
        ranks = tuple(r for r, p in zip(table.ranks, peers.tolist(), strict=True) if p == s.index)
        # The head and the loss are on the last stage from the first step on; hardware becomes slow some time.
        by_design = s.index == stages - 1 and s.since <= len(work) // 10
        if by_design:
            title = f"the last stage has too much: {100 * s.slowdown:.0f}% more work than the others (head and loss)"
            advice = "give the last stage fewer layers, or more stages a rank (an interleaved schedule)"
        else:
            title = f"stage {s.index} of {stages} is slow: {100 * s.slowdown:.0f}% more work than the other stages"
            advice = "all of its ranks are alike: look at what they share (node, switch), then at its layers"
        mine, others = (1e3 * float(np.median(x[when])) for x in (by_stage[:, s.index], rest))
        out.append(Verdict(
            "stage", title, f"{mine:.1f} ms of work per step, the others {others:.1f} ms; z = {min(s.z, 999):.1f}",
            advice, cost, cost / step_s, () if by_design else ranks, f"stage {s.index}", int(table.steps[s.since]),
            ended(table, s),
        ))  # fmt: skip
    return out if out or known is None else _uneven(table, known, by_stage, alpha, step_s)
