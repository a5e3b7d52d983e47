"""Counts what a step multiplies and what it holds, operation by operation, on real and on fake tensors alike."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainsys.flops import causal_pairs
from trainsys.ops.grouped import has_values

aten = torch.ops.aten

PARTS = ("parameters", "gathered", "gradients", "optimizer", "activations", "communication", "temporaries")
"""Parts of a rank's memory: this rank's shards; whole copies of sharded parameters; gradients whole or sharded;
moments; what forward made; flat buffers of sharded collectives; what backward and the update made."""
_OF_PHASE = {"forward": "activations", "data": "activations"}


def _matmul(a: Tensor, b: Tensor) -> int:
    return 2 * a.numel() * b.shape[-1]


def _attention(q: Tensor, k: Tensor, causal: bool) -> int:
    """Both products of one forward. ``q [B, H, S, Dh]``, ``k [B, K, T, Dh]``."""
    batch, heads, rows, dim = q.shape
    pairs = causal_pairs(rows) if causal else rows * k.shape[2]
    return 4 * batch * heads * dim * pairs


# A multiply-add counts 2 and backward twice forward, whatever a kernel computes again: as in `trainsys.flops`.
# Products of a matrix and a vector are norms' here, and norms count nothing.
_FORMULAS: dict[Any, Callable[[tuple[Any, ...]], int]] = {
    aten.mm.default: lambda a: _matmul(a[0], a[1]),
    aten.addmm.default: lambda a: _matmul(a[1], a[2]),
    aten.addmm_.default: lambda a: _matmul(a[1], a[2]),
    aten.bmm.default: lambda a: _matmul(a[0], a[1]),
    aten.baddbmm.default: lambda a: _matmul(a[1], a[2]),
    aten._grouped_mm.default: lambda a: _matmul(a[0], a[1]),
    aten._scaled_dot_product_flash_attention_for_cpu.default: lambda a: _attention(
        a[0], a[1], bool(a[4]) if len(a) > 4 else False
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: lambda a: (
        2 * _attention(a[1], a[2], bool(a[7]))
    ),
}


class Meter(TorchDispatchMode):
    """FLOPs, and bytes alive by part, of what runs while it is active.

    Bytes are those of storages: an allocator's rounding, a kernel's own workspace and the CUDA context come on
    top. ``FSDP2`` empties and refills storages without any operation; ``UntypedStorage.resize_`` is watched for it.
    On fake tensors a value that is read back (``bool(norm > limit)``) is taken to be true or 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        """by name of the operation"""
        self.live: Counter[str] = Counter()
        self.peak = 0
        self.peak_parts: Counter[str] = Counter()
        self._phase = "other"
        self._forced: str | None = None
        self._held: dict[int, tuple[int, str]] = {}

    def __enter__(self) -> Meter:
        self._resize = torch.UntypedStorage.resize_
        meter, original = self, self._resize

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            done = original(storage, size)
            meter._resized(storage)
            return done

        torch.UntypedStorage.resize_ = resize_  # type: ignore[assignment, method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[
                0
            ].fake_device  # asked for by half of all dispatches: not worth a way through the fake mode
        if func is aten._local_scalar_dense.default and not has_values(args[0]):
            return True if args[0].dtype == torch.bool else 1
        formula = _FORMULAS.get(func)
        if formula is not None:
            self.flops[func.overloadpacket.__name__] += formula(args)
        out = func(*args, **(kwargs or {}))
        for x in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(x, Tensor):
                self._made(x)
        return out

    def begin(self) -> None:
        """From here on counts FLOPs and seeks the peak anew; what is alive stays."""
        self.flops.clear()
        self.peak, self.peak_parts = sum(self.live.values()), Counter(self.live)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """As `Recorder.phase`: what the engine is at."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    @contextmanager
    def making(self, part: str) -> Iterator[None]:
        """Whatever is allocated meanwhile is of ``part``."""
        before, self._forced = self._forced, part
        try:
            yield
        finally:
            self._forced = before

    def belongs(self, x: Tensor, part: str) -> None:
        """The storage of ``x`` is of ``part``, whatever it was taken for."""
        storage = x.untyped_storage()
        held = self._held.get(storage._cdata)
        if held is None:
            with self.making(part):
                self._made(x)
        elif held[1] != part:
            self.live[held[1]] -= held[0]
            self.live[part] += held[0]
            self._held[storage._cdata] = held[0], part

    def _made(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        part = self._forced or _OF_PHASE.get(self._phase, "temporaries")
        self._held[key] = storage.nbytes(), part
        weakref.finalize(storage, self._freed, key)
        self._add(storage.nbytes(), part)

    def _freed(self, key: int) -> None:
        size, part = self._held.pop(key)
        self.live[part] -= size

    def _resized(self, storage: torch.UntypedStorage) -> None:
        held = self._held.get(storage._cdata)
        if held is None:
            return
        size, part = held
        self._held[storage._cdata] = storage.nbytes(), part
        self._add(storage.nbytes() - size, part)

    def _add(self, size: int, part: str) -> None:
        self.live[part] += size
        total = sum(self.live.values())
        if total > self.peak:
            self.peak, self.peak_parts = total, Counter(self.live)
