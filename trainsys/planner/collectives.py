"""Seconds of a collective from bytes, group and machine: rings and all-to-alls over two tiers.

A group of ``n`` ranks that are ``stride`` apart puts ``r = min(n, domain / stride)`` of them in one scale-up
domain (NVLink, xGMI). Inside a domain a ring moves at the link's rate. Across domains every domain's NICs
are shared by the ``domain / r`` groups that reduce at the same time, so one group's ring gets
``nic_bw * r / domain`` bytes/s: the number that decides most layouts. Ring cost: Thakur, Rabenseifner & Gropp,
"Optimization of Collective Communication Operations in MPICH", 2005.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainsys.planner.cases import Array, Cases
from trainsys.planner.constants import Constants


@dataclass(frozen=True)
class Group:
    """Ranks of one axis: ``n`` of them, ``local`` in one domain, with the ring's rate and step latency."""

    n: Array
    local: Array
    rate: Array  # bytes/s around the ring
    hop_s: Array  # seconds of one ring step

    def wire(self, nbytes: Array | float) -> Array:
        """The part of ``ring`` in which bytes move: what competes with compute for memory and cores."""
        out: Array = (self.n - 1.0) / self.n * nbytes / self.rate
        return out

    def ring(self, nbytes: Array | float) -> Array:
        """All-gather or reduce-scatter of ``nbytes`` (the full tensor): n-1 steps of nbytes/n."""
        steps = self.n - 1.0
        out: Array = steps * (nbytes / self.n / self.rate) + steps * self.hop_s
        return out

    def all_reduce(self, nbytes: Array | float) -> Array:
        """Reduce-scatter and all-gather in bytes; a tree's latency where that is shorter."""
        wire = 2.0 * (self.n - 1.0) / self.n * nbytes / self.rate
        hops = np.minimum(2.0 * (self.n - 1.0), 4.0 * np.ceil(np.log2(np.maximum(self.n, 1.0))))
        out: Array = wire + hops * self.hop_s
        return out


def group(c: Cases, k: Constants, n: Array, stride: Array) -> Group:
    """The group of ``n`` ranks, ``stride`` apart, of each case."""
    local = np.clip(np.floor(c.domain / stride), 1.0, n)
    crosses = n > local
    pair = np.where(local <= 2.0, np.minimum(c.link_bw, c.pair_bw), c.link_bw)
    mesh = np.where(
        c.pair_bw < c.link_bw, np.minimum(c.link_bw, c.pair_bw * np.maximum(local - 1.0, 1.0)), pair
    )
    inside = k.link_eff * mesh
    outside = np.minimum(inside, k.nic_eff * c.nic_bw * local / c.domain)
    rate = np.where(crosses, outside, inside)
    return Group(n, local, rate, hop_seconds(k, local, crosses))


def hop_seconds(k: Constants, local: Array, crosses: NDArray[np.bool_]) -> Array:
    """Latency of one ring step, mean over the ring: of ``local`` neighbours in a domain, one sends out of it."""
    out: Array = np.where(
        crosses, k.hop_inter_s * (1.0 / local) + k.hop_intra_s * (1.0 - 1.0 / local), k.hop_intra_s
    )
    return out


def all_to_all(g: Group, c: Cases, k: Constants, nbytes: Array, crossing: Array | float = 1.0) -> Array:
    """Each rank sends ``nbytes`` in all, evenly: part inside the domain, part through its share of the NICs;
    ``crossing``: the share of that part that has to."""
    away = (g.n - g.local) / g.n * crossing
    near = (g.local - 1.0) / g.n
    near_s = nbytes * near / (k.link_eff * c.link_bw)
    away_s = nbytes * away / (k.nic_eff * c.nic_bw / c.domain)
    out: Array = np.where(g.n > 1, np.maximum(near_s, away_s) + k.hop_inter_s * np.minimum(g.n, 8.0), 0.0)
    return out


def send_recv(c: Cases, k: Constants, nbytes: Array, stride: Array) -> Array:
    """One point-to-point hop to the rank ``stride`` away; every device of the domain sends at once."""
    crosses = stride >= c.domain
    rate = np.where(crosses, k.nic_eff * c.nic_bw / c.domain, k.link_eff * c.pair_bw)
    out: Array = nbytes / rate + np.where(crosses, k.hop_inter_s, k.hop_intra_s)
    return out
