"""Operations of torch as kernels: on which stream, what they read and write, and what memory comes and goes."""

from __future__ import annotations

import functools
import weakref
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.virtual.device import Device
from support.virtual.trace import Alloc, Free, Kernel
from trainsys.comm.ops import nbytes
from trainsys.dryrun.meter import _FORMULAS

_NO_KERNEL = ("empty", "new_empty", "detach", "promote_types")


class Operations(TorchDispatchMode):
    """Kernels, and the storages that they read, write and make."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self._number: dict[int, int] = {}
        """storage -> its number; none while it is empty"""
        self._known: set[int] = set()
        self._numbers = count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its operations on local tensors come by
        if func is torch.ops.aten._local_scalar_dense.default:
            self.device.host_sync("item")
            return True if args[0].dtype == torch.bool else 1
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace not in ("aten", "fsdp"):
            return out
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        made = {self.of(t) for t in outputs}
        if func.is_view or func.__name__.startswith(_NO_KERNEL):
            return out
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        written = {self.of(t) for t in _written(func, args, kwargs)}
        if func.namespace == "fsdp":
            written |= made  # its copy-in gives back views of what it fills, and its schema does not say so
        read = {self.of(t) for t in inputs} - written
        if not inputs and not outputs:
            return out
        formula = _FORMULAS.get(func)
        self.device.nodes.append(
            Kernel(
                self.device.current,
                func.overloadpacket.__name__,
                0 if formula is None else formula(args),
                sum(nbytes(t) for t in (*inputs, *outputs)),
                tuple(read),
                tuple(written | made - read),
            )
        )
        return out

    def of(self, x: Tensor) -> int:
        """The number of a tensor's storage; a new one was allocated just now."""
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            weakref.finalize(storage, self._freed, key)
            self._filled(key)
        return self._number.get(key, -1)

    def resized(self, storage: torch.UntypedStorage, before: int) -> None:
        key, after = storage._cdata, storage.nbytes()
        if key not in self._known or before == after:
            return
        if before:
            self._emptied(key)
        if after:
            self._filled(key)

    def _filled(self, key: int) -> None:
        number = self._number[key] = next(self._numbers)
        self.device.nodes.append(Alloc(self.device.current, number))

    def _emptied(self, key: int) -> None:
        if key in self._number:
            self.device.nodes.append(Free(self._number.pop(key)))

    def _freed(self, key: int) -> None:
        self._emptied(key)
        self._known.discard(key)


@functools.cache
def _mutated(func: Any) -> tuple[tuple[int, str], ...]:
    arguments = enumerate(func._schema.arguments)
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    values = [args[i] if i < len(args) else kwargs.get(name) for i, name in _mutated(func)]
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]
