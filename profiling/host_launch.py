"""Host time to launch the kernels of one transformer layer in plain PyTorch, for the prior of ``layer_host_s``.

    python profiling/host_launch.py [--json FILE]

A layer as Megatron's classic stack writes it (unfused attention, dropout, two LayerNorms) on tensors so small that a CPU
spends its time in Python, dispatch and autograd rather than in arithmetic: the part of a launch that a GPU's host pays
too, to which the driver's own few microseconds a kernel come. Best of many passes, one thread.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path
from typing import Any

import torch
from recorded import record
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu
from torch.utils._python_dispatch import TorchDispatchMode

_VIEWS = ("view", "transpose", "aten.t.", "unsqueeze", "expand", "detach", "slice", "split", "alias", "select")


class Layer(nn.Module):
    """[tokens, 1, width] in and out."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens, batch, width = x.shape
        q, k, v = (
            t.view(tokens, batch * self.heads, width // self.heads).transpose(0, 1)
            for t in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mask = torch.full((tokens, tokens), -1e4).triu(1)
        p = dropout(torch.softmax(torch.baddbmm(mask, q, k.transpose(1, 2), alpha=0.25), -1), 0.1)
        heads = torch.bmm(p, v).transpose(0, 1).contiguous().view(tokens, batch, width)
        x = x + dropout(self.out(heads), 0.1)
        return x + dropout(self.down(gelu(self.up(self.norm2(x)))), 0.1)


class Kernels(TorchDispatchMode):
    """Counts operations that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not any(v in str(func) for v in _VIEWS)
        return func(*args, **(kwargs or {}))


def measure(passes: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    layer, x = Layer(), torch.randn(16, 1, 64, requires_grad=True)
    with Kernels() as forward:
        y = layer(x)
    with Kernels() as backward:
        y.sum().backward()
    best_f = best_b = float("inf")
    for _ in range(passes):
        t0 = time.perf_counter()
        y = layer(x)
        t1 = time.perf_counter()
        y.backward(torch.ones_like(y))
        best_f, best_b = min(best_f, t1 - t0), min(best_b, time.perf_counter() - t1)
    return {
        "torch": torch.__version__, "cpu": platform.processor() or platform.machine(), "passes": passes,
        "forward_kernels": forward.count, "backward_kernels": backward.count,
        "forward_us": round(1e6 * best_f), "backward_us": round(1e6 * best_b),
        "forward_us_a_kernel": round(1e6 * best_f / forward.count, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passes", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    record(measure(args.passes), args.json)


if __name__ == "__main__":
    main()
