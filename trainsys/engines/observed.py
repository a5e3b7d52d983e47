"""Counts the collectives of an engine that is not ours, by axis, in the same ledger.

The methods of ``torch.distributed.ProcessGroup`` are wrapped: below the functions of which other packages keep
references, so it does not matter when they were imported or under what names. Each call counts once, when it is
waited for, and the wait is what is timed: a blocking function of ``torch.distributed`` waits at once. Calls from
trainsys are left alone, for `trainsys.comm` counts itself. What C++ starts by itself (torch's own DDP) is not seen.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from trainsys.comm.ops import nbytes
from trainsys.layout import Axis
from trainsys.parallel.mesh import Mesh

# As which axis a group counts that is known by its ranks alone, where several axes have the same ranks.
_PRIORITY: tuple[Axis, ...] = ("tp", "cp", "pp", "ep", "fsdp", "dp_replicate", "expert_fsdp", "loss", "world")

Sent = Callable[..., int]
"""(rank in the group, its size, *arguments of the method) -> bytes that this rank puts on the wire by a
bandwidth-optimal algorithm; see :class:`trainsys.comm.ledger.Traffic`."""


def _all(tensors: Any) -> int:
    """Bytes of a tensor, or of lists of them."""
    return nbytes(tensors) if isinstance(tensors, Tensor) else sum(map(_all, tensors))


def _all_reduce(rank: int, n: int, tensors: Any, *_: Any) -> int:
    return 2 * _all(tensors) * (n - 1) // n


def _gathered(rank: int, n: int, output: Any, source: Any, *_: Any) -> int:
    return _all(source) * (n - 1)


def _scattered(rank: int, n: int, output: Any, source: Any, *_: Any) -> int:
    return _all(output) * (n - 1)


def _exchanged(
    rank: int, n: int, output: Any, source: Any, out_splits: Any = None, splits: Any = None, *_: Any
) -> int:
    """All but what stays here; ``splits``: rows for each rank, equal where there are none."""
    if splits is None or len(splits) == 0:
        return _all(source) * (n - 1) // n
    rows = [int(size) for size in splits]
    return _all(source) * (sum(rows) - rows[rank]) // max(1, sum(rows))


def _lists_exchanged(rank: int, n: int, outputs: Any, sources: Any, *_: Any) -> int:
    return _all(sources) - _all(sources[rank])


def _from_root(rank: int, n: int, tensors: Any, options: Any = None, *_: Any) -> int:
    return _all(tensors) if options is None or options.rootRank == rank else 0


def _to_root(rank: int, n: int, tensors: Any, options: Any = None, *_: Any) -> int:
    return _all(tensors) - _from_root(rank, n, tensors, options)


def _sent(rank: int, n: int, tensors: Any, *_: Any) -> int:
    return _all(tensors)


def _nothing(rank: int, n: int, *_: Any) -> int:
    return 0


# torch 2.13 renamed some; those that this torch lacks are passed over.
_METHODS: dict[str, tuple[str, Sent]] = {
    "allreduce": ("all_reduce", _all_reduce),
    "allreduce_coalesced": ("all_reduce", _all_reduce),
    "allgather": ("all_gather", _gathered),
    "allgather_coalesced": ("all_gather", _gathered),
    "_allgather_base": ("all_gather", _gathered),
    "all_gather_single": ("all_gather", _gathered),
    "allgather_into_tensor_coalesced": ("all_gather", _gathered),
    "all_gather_single_coalesced": ("all_gather", _gathered),
    "reduce_scatter": ("reduce_scatter", _scattered),
    "_reduce_scatter_base": ("reduce_scatter", _scattered),
    "reduce_scatter_single": ("reduce_scatter", _scattered),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", _scattered),
    "reduce_scatter_single_coalesced": ("reduce_scatter", _scattered),
    "alltoall": ("all_to_all", _lists_exchanged),
    "alltoall_base": ("all_to_all", _exchanged),
    "all_to_all_single": ("all_to_all", _exchanged),
    "broadcast": ("broadcast", _from_root),
    "reduce": ("reduce", _to_root),
    "send": ("send", _sent),
    "recv": ("recv", _nothing),
    "recv_anysource": ("recv", _nothing),
}

Span = Callable[[], AbstractContextManager[Any]]


class _Awaited:
    """A ``Work`` whose first wait is one call in the ledger."""

    def __init__(self, work: Any, span: Span) -> None:
        self._work, self._span = work, span

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        span = self.__dict__.pop("_span", None)
        if span is None:
            return self._work.wait(*args, **kwargs)
        with span():
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class Observer:
    """Counts into the ledger of ``mesh`` until `stop`.

    ``names``: group description -> axis, for packages that describe their groups; others are told by their ranks.
    Groups that are neither count as ``other``; groups of one rank do not count.
    """

    def __init__(self, mesh: Mesh, names: Mapping[str, str] | None = None) -> None:
        self._ledger, self._names = mesh.ledger, dict(names or {})
        self._axis_of = {mesh.ranks(a): a for a in reversed(_PRIORITY) if mesh.layout.size(a) > 1}
        self._known: dict[str, tuple[str, int, int]] = {}
        self._open: dict[str, list[tuple[str, int]]] = {}
        """The calls that each group is coalescing into one."""
        self._real: dict[str, Any] = {}
        for name, (op, sent) in _METHODS.items():
            if hasattr(dist.ProcessGroup, name):
                self._replace(name, functools.partial(self._called, op, sent))
        for name in ("_start_coalescing", "_end_coalescing"):
            self._replace(name, getattr(self, name))

    def stop(self) -> None:
        """torch's own methods are back."""
        for name, real in self._real.items():
            setattr(dist.ProcessGroup, name, real)
        self._real.clear()

    def _replace(self, name: str, by: Callable[..., Any]) -> None:
        real = getattr(dist.ProcessGroup, name)
        self._real[name] = vars(dist.ProcessGroup)[name]  # as it lies there: what getattr gives binds no instance

        @functools.wraps(real)
        def method(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            return by(real, group, *args, **kwargs)

        setattr(dist.ProcessGroup, name, method)

    def _place(self, group: dist.ProcessGroup) -> tuple[str, int, int]:
        """(axis, this rank's place, size) of a group."""
        name = group.group_name
        if name not in self._known:
            ranks = tuple(sorted(dist.get_process_group_ranks(group)))
            axis = self._names.get(group.group_desc) or self._axis_of.get(ranks, "other")
            self._known[name] = (axis, group.rank(), len(ranks))
        return self._known[name]

    def _called(
        self,
        op: str,
        sent: Sent,
        real: Callable[..., Any],
        group: dist.ProcessGroup,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        axis, rank, size = self._place(group)
        if size == 1 or _is_ours():
            return real(group, *args, **kwargs)
        count = sent(rank, size, *args, *kwargs.values())
        work = real(group, *args, **kwargs)
        if group.group_name in self._open:
            self._open[group.group_name].append((op, count))
            return work
        return None if work is None else _Awaited(work, lambda: self._ledger.span(axis, op, count))

    def _start_coalescing(self, real: Callable[..., Any], group: dist.ProcessGroup, *args: Any) -> Any:
        self._open[group.group_name] = []
        return real(group, *args)

    def _end_coalescing(self, real: Callable[..., Any], group: dist.ProcessGroup, *args: Any) -> Any:
        calls = self._open.pop(group.group_name, [])
        work = real(group, *args)
        if not calls or work is None:
            return work
        axis = self._place(group)[0]
        ops = {op for op, _ in calls}
        op = ops.pop() if len(ops) == 1 else "exchange"
        total = sum(count for _, count in calls)
        return _Awaited(work, lambda: self._ledger.span(axis, op, total))


def _is_ours() -> bool:
    """Whether trainsys called, as opposed to another package or a script."""
    frame = sys._getframe(3)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("torch."):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).startswith("trainsys.")


_observer: Observer | None = None


def observe(mesh: Mesh, names: Mapping[str, str] | None = None) -> Observer:
    """Count from now on, in place of who did before; see `Observer`."""
    global _observer
    if _observer is not None:
        _observer.stop()
    _observer = Observer(mesh, names)
    return _observer
