"""Calls of process groups, as NCCL's in torch 2.8 and later: on the current stream where the caller blocks, else on a
stream of the communicator, which keeps the tensors until somebody waits. A batch of messages is one kernel of the
group's communicator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from support.virtual.device import Device, Stream
from support.virtual.operations import Operations
from support.virtual.trace import Channel, Comm, Message
from trainsys.comm.ops import nbytes
from trainsys.dryrun.swap import swapped
from trainsys.engines.observed import _METHODS
from trainsys.parallel.pipeline.transport import Transport, _key


class _Work(dist.Work):
    def __init__(self, device: Device, event: int) -> None:
        super().__init__()
        self._device, self._event = device, event

    def wait(self, *_: Any) -> bool:
        self._device.wait(self._device.current, self._event)
        return True


class Communication:
    """Calls of process groups, as `Comm`."""

    def __init__(self, device: Device, operations: Operations, axis_of: dict[str, str]) -> None:
        self.device, self.operations, self.axis_of = device, operations, axis_of
        self._streams: dict[Channel, int] = {}
        self._keys: list[tuple[object, ...]] = []

    @contextmanager
    def seen(self) -> Iterator[None]:
        start = Transport.start

        def keyed(transport: Transport, exchange: Any, outputs: Any) -> None:
            self._keys = [_key(m) for m in (*exchange.sends, *exchange.receives)]
            start(transport, exchange, outputs)

        with ExitStack() as stack:
            for name, (op, sent) in _METHODS.items():
                if hasattr(dist.ProcessGroup, name):
                    stack.enter_context(swapped(dist.ProcessGroup, name, self._method(op, sent)))
            stack.enter_context(swapped(Transport, "start", keyed))
            stack.enter_context(swapped(dist, "batch_isend_irecv", self._posted))
            yield

    def _method(self, op: str, sent: Any) -> Any:
        def called(group: Any, *args: Any, **kwargs: Any) -> Any:
            return self._called(op, sent, group, *args, **kwargs)

        return called

    def _called(self, op: str, sent: Any, group: Any, *args: Any, **kwargs: Any) -> Any:
        assert op not in ("send", "recv"), "messages come in batches"
        with _disable_current_modes():
            count = sent(group.rank(), group.size(), *args, *kwargs.values())
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        options = next((o for o in (*args, *kwargs.values()) if hasattr(o, "asyncOp")), None)
        blocks = options is not None and not options.asyncOp
        # The output comes first; of a reduction in place it is the input.
        written, read = tensors[:1], tensors[1:] or tensors
        return self._add(group, op, count, read, written, blocks=blocks)

    def _posted(self, todo: list[dist.P2POp]) -> list[dist.Work]:
        keys = self._keys or [(p.tag, tuple(p.tensor.shape), str(p.tensor.dtype)) for p in todo]
        self._keys = []
        messages = tuple(
            Message(p.op is dist.isend, p.peer, key, nbytes(p.tensor))
            for p, key in zip(todo, keys, strict=True)
        )
        read = [p.tensor for p in todo if p.op is dist.isend]
        written = [p.tensor for p in todo if p.op is not dist.isend]
        sent = max(sum(m.nbytes for m in messages if m.sends), sum(m.nbytes for m in messages if not m.sends))
        return [self._add(todo[0].group, "messages", sent, read, written, blocks=False, messages=messages)]

    def _add(
        self,
        group: Any,
        op: str,
        count: int,
        read: list[Tensor],
        written: list[Tensor],
        *,
        blocks: bool,
        messages: tuple[Message, ...] = (),
    ) -> _Work | None:
        channel = group.group_name, tuple(dist.get_process_group_ranks(group))
        device, of = self.device, self.operations.of
        stream = device.current
        reads, writes = tuple({of(t) for t in read}), tuple({of(t) for t in written})
        if not blocks:
            if channel not in self._streams:
                self._streams[channel] = Stream(device).number  # NCCL's, not the product's
            own = self._streams[channel]
            device.wait(own, device.new_event(stream))
            stream = own
        shape = tuple(nbytes(t) for t in (*written, *read))
        axis = self.axis_of.get(group.group_name, "other")
        device.nodes.append(Comm(stream, channel, axis, op, shape, count, reads, writes, messages))
        if blocks:
            return None
        event = device.new_event(stream)
        device.held[event] = [*read, *written]
        return _Work(device, event)
