"""What Megatron-Core needs to run without CUDA. Nothing here is used on a GPU.

Megatron wants CUDA in six ways: ``torch.cuda.current_device()`` as where a tensor goes; literal ``device="cuda"``
and ``.cuda()``; streams, events and ``synchronize``; the states of CUDA's generators; the names of tensor types;
and sizes that become numbers only on their way from a device.
torch itself stays as it is: its modules are given another ``torch``, a copy of the namespace in which these few names
lead to the CPU. Only ``Tensor.cuda`` and ``Tensor.type`` cannot be reached so, and are replaced while a model and its
optimizer are built.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_CPU = torch.device("cpu")


class _Stream:
    """A stream on which everything has happened already."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def record(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _copy(module: ModuleType, **replaced: Any) -> ModuleType:
    made = ModuleType(module.__name__)
    made.__dict__.update(vars(module), **replaced)
    made.__getattr__ = lambda name: getattr(module, name)  # type: ignore[method-assign]
    return made


def _here(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A factory of tensors to which "cuda" means the CPU."""

    def called(*args: Any, **kwargs: Any) -> Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = _CPU
        return make(*args, **kwargs)

    return called


def _no_state(*_: Any, **__: Any) -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Sizes of the experts' rows, which Megatron turns into numbers only where they come from a device."""
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


def _nothing(*_: Any, **__: Any) -> None: ...


def _torch() -> ModuleType:
    cuda = _copy(
        torch.cuda,
        current_device=lambda: _CPU,
        synchronize=_nothing,
        empty_cache=_nothing,
        manual_seed=_nothing,
        get_rng_state=_no_state,
        set_rng_state=_nothing,
        Stream=_Stream,
        Event=_Stream,
        current_stream=_Stream,
        default_stream=_Stream,
        stream=lambda *_: nullcontext(),
    )
    factories = ("tensor", "zeros", "ones", "empty", "full", "arange")
    return _copy(torch, cuda=cuda, **{name: _here(getattr(torch, name)) for name in factories})


def install() -> None:
    """Give every module of Megatron-Core that is loaded the other torch. A second call does nothing."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    if random.torch is not torch:
        return
    random._get_cuda_rng_state, random._set_cuda_rng_state = _no_state, _nothing  # type: ignore[attr-defined]
    router = importlib.import_module("megatron.core.transformer.moe.router").TopKRouter
    # Compiled for a GPU; the plain function is inside.
    router._apply_expert_bias = getattr(
        router._apply_expert_bias, "_torchdynamo_orig_callable", router._apply_expert_bias
    )
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = _as_numpy  # type: ignore[attr-defined]
    stand_in = _torch()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = stand_in  # type: ignore[attr-defined]


@contextmanager
def cuda_by_name(device: torch.device) -> Iterator[None]:
    """On CPU: within, tensors say they are CUDA's when asked for their type, and ``.cuda()`` stays. On a GPU:
    nothing."""
    if device.type != "cpu":
        yield
        return
    cuda, type_ = Tensor.cuda, Tensor.type

    def named(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        said = type_(self, *args, **kwargs)
        return said.replace("torch.", "torch.cuda.", 1) if isinstance(said, str) else said

    Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    Tensor.type = named  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Tensor.cuda, Tensor.type = cuda, type_  # type: ignore[method-assign]
