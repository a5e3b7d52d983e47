"""Counts the collectives of an engine that is not ours, by axis, in the same ledger.

The functions of ``torch.distributed`` are wrapped; a process group is told by its ranks. Call `observe` before
the engine's package is imported, for some keep these functions under names of their own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainsys.comm.ops import nbytes
from trainsys.parallel.mesh import Mesh

# Which axis a group of ranks is counted as, where several axes have the same ranks.
_PRIORITY = ("tp", "cp", "pp", "ep", "fsdp", "dp_replicate", "loss", "expert_fsdp", "world")


class _Bytes:
    """What one rank puts on the wire by a bandwidth-optimal algorithm (see ``comm.ledger.Traffic``): functions
    of the call's arguments and the group's size."""

    @staticmethod
    def all_reduce(n: int, tensor: Tensor, *_: Any, **__: Any) -> int:
        return 2 * nbytes(tensor) * (n - 1) // n

    @staticmethod
    def all_gather_flat(n: int, output: Tensor, source: Tensor, *_: Any, **__: Any) -> int:
        return nbytes(source) * (n - 1)

    @staticmethod
    def reduce_scatter_flat(n: int, output: Tensor, source: Tensor, *_: Any, **__: Any) -> int:
        return nbytes(output) * (n - 1)

    @staticmethod
    def all_gather(n: int, outputs: list[Tensor], tensor: Tensor, *_: Any, **__: Any) -> int:
        return nbytes(tensor) * (n - 1)

    @staticmethod
    def all_to_all_single(n: int, output: Tensor, source: Tensor, *_: Any, **__: Any) -> int:
        return nbytes(source) * (n - 1) // n

    @staticmethod
    def rooted(n: int, tensor: Tensor, *_: Any, **__: Any) -> int:
        """Broadcast and reduce, along a chain."""
        return nbytes(tensor)


_BYTES: dict[str, tuple[str, Callable[..., int]]] = {
    "all_reduce": ("all_reduce", _Bytes.all_reduce),
    "all_gather_into_tensor": ("all_gather", _Bytes.all_gather_flat),
    "all_gather_single": ("all_gather", _Bytes.all_gather_flat),
    "_all_gather_base": ("all_gather", _Bytes.all_gather_flat),
    "reduce_scatter_tensor": ("reduce_scatter", _Bytes.reduce_scatter_flat),
    "reduce_scatter_single": ("reduce_scatter", _Bytes.reduce_scatter_flat),
    "_reduce_scatter_base": ("reduce_scatter", _Bytes.reduce_scatter_flat),
    "all_gather": ("all_gather", _Bytes.all_gather),
    "all_to_all_single": ("all_to_all", _Bytes.all_to_all_single),
    "broadcast": ("broadcast", _Bytes.rooted),
    "reduce": ("reduce", _Bytes.rooted),
    "send": ("send", _Bytes.rooted),
    "isend": ("send", _Bytes.rooted),
}
_RECEIVES = ("recv", "irecv")


class _Awaited:
    """A collective in flight; the wait for it is what is timed."""

    def __init__(self, work: Any, span: Callable[[], Any]) -> None:
        self._work, self._span = work, span

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        if self._span is None:
            return self._work.wait(*args, **kwargs)
        span, self._span = self._span, None  # type: ignore[assignment]
        with span():
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class Observer:
    """Wraps ``torch.distributed`` of this process until `stop`."""

    def __init__(self, mesh: Mesh) -> None:
        self.ledger = mesh.ledger
        self._axis_of = {mesh[axis].ranks: axis for axis in reversed(_PRIORITY) if mesh[axis].size > 1}
        self._known: dict[int, tuple[dist.ProcessGroup, str, int]] = {}
        self._inside = False
        self._real: dict[str, Any] = {}
        for name in (*_BYTES, *_RECEIVES):
            if (real := getattr(dist, name, None)) is not None:
                self._replace(name, self._wrapped(name, real))
        self._replace("batch_isend_irecv", self._batch(dist.batch_isend_irecv))

    def _replace(self, name: str, by: Any) -> None:
        self._real[name] = getattr(dist, name)
        setattr(dist, name, by)

    def stop(self) -> None:
        for name, real in self._real.items():
            setattr(dist, name, real)
        self._real.clear()

    def _place(self, group: dist.ProcessGroup | None) -> tuple[str, int]:
        """(axis, size) of a process group."""
        group = group or dist.group.WORLD
        assert group is not None
        found = self._known.get(id(group))
        if found is None:
            ranks = tuple(sorted(dist.get_process_group_ranks(group)))
            # The group is kept: an id is of one object only as long as it lives.
            found = self._known[id(group)] = (group, self._axis_of.get(ranks, "other"), len(ranks))
        return found[1:]

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        op, count = _BYTES.get(name, ("recv", lambda n, *args, **kwargs: 0))

        @functools.wraps(real)
        def call(*args: Any, **kwargs: Any) -> Any:
            # Our own collectives count themselves, and some functions here call others.
            if self._inside or _caller().startswith("trainsys.comm"):
                return real(*args, **kwargs)
            group = kwargs.get("group") or next((a for a in args if isinstance(a, dist.ProcessGroup)), None)
            axis, n = self._place(group)
            sizes = count(n, *_tensors(args, kwargs))

            def span() -> Any:
                return self.ledger.span(axis, op, sizes)

            self._inside = True
            try:
                if kwargs.get("async_op") or name in ("isend", "irecv"):
                    work = real(*args, **kwargs)
                    return work if work is None else _Awaited(work, span)
                with span():
                    return real(*args, **kwargs)
            finally:
                self._inside = False

        return call

    def _batch(self, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def call(operations: list[dist.P2POp]) -> list[Any]:
            if self._inside or _caller().startswith("trainsys.comm"):
                return real(operations)  # type: ignore[no-any-return]
            axis, _ = self._place(operations[0].group)
            sends = self._real["isend"]
            sent = sum(nbytes(p.tensor) for p in operations if p.op is sends or p.op is dist.isend)
            self._inside = True
            try:
                for p in operations:  # the wrapped functions are unknown to it
                    p.op = getattr(p.op, "__wrapped__", p.op)
                works = real(operations)
            finally:
                self._inside = False
            # One exchange, one call: what the first wait blocks for stands for all of them.
            return [_Awaited(works[0], lambda: self.ledger.span(axis, "exchange", sent)), *works[1:]]

        return call


def _caller() -> str:
    """The module that called the wrapped function."""
    return str(sys._getframe(2).f_globals.get("__name__", ""))


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[Any]:
    """The tensors (or lists of them) among the arguments, in the order of the signatures, output first."""
    given = [*args, *(kwargs[k] for k in kwargs if k not in ("group", "async_op", "op", "src", "dst"))]
    return [a for a in given if isinstance(a, torch.Tensor) or (isinstance(a, list) and a)]


def observe(mesh: Mesh) -> Observer:
    """Count from now on; see `Observer`."""
    return Observer(mesh)
