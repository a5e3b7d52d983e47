"""Executes a rank's program: one loop over instructions, the same for real stages and for stand-ins that sleep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from trainsys.parallel.pipeline.transport import Key, Transport
from trainsys.schedules.program import Compute, Exchange, Gather, Instruction, Release


class Stage(Protocol):
    """One stage of this rank. ``micro`` counts the micro-batches of a step from 0."""

    def forward(self, micro: int, x: Tensor | None) -> Tensor:
        """From what the stage before made (None on the first) to what the next is given."""
        ...

    def backward(self, micro: int, grad: Tensor | None, *, weights: bool) -> Tensor | None:
        """From the gradient of the stage's output (None on the last) to that of its input; weight gradients too,
        or, without ``weights``, later."""
        ...

    def backward_weight(self, micro: int) -> None:
        """The weight gradients that `backward` left."""
        ...

    def gather(self) -> None:
        """Start to gather parameters; `forward` and `backward` wait for them."""
        ...

    def release(self) -> None: ...

    def reduce(self) -> None:
        """Start to reduce the gradients of the step."""
        ...


class Runtime:
    """``stages``: those of this rank, by number, of ``n_stages``."""

    def __init__(
        self,
        program: Sequence[Instruction],
        stages: Mapping[int, Stage],
        n_stages: int,
        transport: Transport,
    ) -> None:
        self.program, self.stages, self.transport = program, stages, transport
        self._last = n_stages - 1

    def run(self) -> None:
        """One step, but for reductions that `reduce` has started."""
        transport, stages, here = self.transport, self.stages, self.stages.keys()
        made: dict[Key, Tensor] = {}
        for instruction in self.program:
            if isinstance(instruction, Compute):
                op, number, micro = instruction.action
                stage = stages[number]
                if op == "F":
                    x = None
                    if number > 0:
                        before = (True, number - 1, micro)
                        x = made.pop(before) if number - 1 in here else transport.take(*before)
                    out = stage.forward(micro, x)
                    if number < self._last:
                        made[True, number, micro] = out
                elif op == "W":
                    stage.backward_weight(micro)
                else:
                    grad = None
                    if number < self._last:
                        after = (False, number + 1, micro)
                        grad = made.pop(after) if number + 1 in here else transport.take(*after)
                    back = stage.backward(micro, grad, weights=op == "B")
                    if back is not None:
                        made[False, number, micro] = back
            elif isinstance(instruction, Exchange):
                transport.start(instruction, made)
            elif isinstance(instruction, Gather):
                stages[instruction.stage].gather()
            elif isinstance(instruction, Release):
                stages[instruction.stage].release()
            else:
                stages[instruction.stage].reduce()
        transport.finish()
