"""A device that CPUs play: tensors know whether they would be on it, and a collective of one that would not fails, as
NCCL's does.

A tensor is on the device if it was made there (``device=DEVICE``), sent there (``.to(DEVICE)``), or computed from one
that is; a new one without a device, what ``.cpu()`` gives, and what is made of Python numbers are on the host.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cpu", 0)
"""Equal to no ``torch.device("cpu")``."""
_TYPE = Tensor.type


class OnHost(AssertionError):
    """A collective was given a tensor that a backend of devices alone does not take."""


class _Placed(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.there: set[int] = set()
        self.collectives = 0

    def put(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self.there:
            self.there.add(storage._cdata)
            weakref.finalize(storage, self.there.discard, storage._cdata)
        return x

    def holds(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.untyped_storage()._cdata in self.there

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func.namespace in ("c10d", "_c10d_functional"):
            self.collectives += bool(given)
            for x in given:
                if not self.holds(x):
                    raise OnHost(f"{func}: a tensor of {tuple(x.shape)} on the host")
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:  # where it goes, there it is
            return out
        # Here, and not by the mode of functions alone, which is off during backward.
        if any(map(self.holds, given)) or _is_device((kwargs or {}).get("device")):
            for x in tree_leaves(out):
                if isinstance(x, Tensor):
                    self.put(x)
        return out


def _is_device(said: Any) -> bool:
    return isinstance(said, torch.device) and said == DEVICE


class _Factories(TorchFunctionMode):
    def __init__(self, placed: _Placed) -> None:
        super().__init__()
        self.placed = placed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.type:  # which an engine may have replaced by what has called it
            return _TYPE(*args, **kwargs)
        out = func(*args, **kwargs)
        if func is Tensor.cpu:
            host = out.detach().clone()
            self.placed.there.discard(host.untyped_storage()._cdata)
            return host
        named = (kwargs.get("device"), *(args[1:2] if func is Tensor.to else ()))
        if isinstance(out, Tensor) and any(map(_is_device, named)):
            if func is Tensor.to and not self.placed.holds(out):
                out = out.clone()
            return self.placed.put(out)
        return out


@contextmanager
def device_alone() -> Iterator[_Placed]:
    """Meanwhile every collective of this process refuses what is on the host."""
    placed = _Placed()
    c10d: Any = dist.distributed_c10d
    # Objects travel by the group's device, as torch sees to.
    before, c10d._get_object_coll_device = c10d._get_object_coll_device, lambda group=None: DEVICE
    try:
        with placed, _Factories(placed):
            yield placed
    finally:
        c10d._get_object_coll_device = before
