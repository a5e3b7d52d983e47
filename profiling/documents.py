"""Attention over packed documents: a mask of all pairs against the documents themselves, forward and backward, on a CPU.

    python profiling/documents.py [--seq 4096] [--documents 8] [--heads 4] [--kv-heads 2] [--repeats 3] [--out FILE]

The mask goes to ``scaled_dot_product_attention`` as a bool of ``seq x seq``, made once; the documents go through the
attention seam. CPU seconds (user and system) of the best repeat, their ratio, and the bytes at the peak, inputs
included. Both must give the same gradients.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from trainsys.dryrun.meter import Meter
from trainsys.ops.attention_rule import Block, Rule
from trainsys.ops.attention_seam import WholeRows, attend
from trainsys.ops.documents import Documents

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_mask(ids: Tensor) -> Attention:
    seq = range(ids.shape[1])
    mask = Block(Rule(docs=Documents.of(ids)), seq, seq).mask(ids.device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    return run


def by_documents(ids: Tensor) -> Attention:
    rule = Rule(docs=Documents.of(ids))
    return lambda q, k, v: attend(q, k, v, WholeRows(), rule)[0]


def measure(make: Callable[[Tensor], Attention], args: argparse.Namespace) -> tuple[float, int, list[Tensor]]:
    """CPU seconds, bytes at the peak, inputs included, and gradients."""
    torch.manual_seed(0)
    borders = torch.randperm(args.seq - 1)[: args.documents - 1] + 1
    ids = torch.zeros(1, args.seq, dtype=torch.int64)
    ids[0, borders] = 1
    ids = ids.cumsum(1)
    shapes = [(1, args.seq, heads, 64) for heads in (args.heads, args.kv_heads, args.kv_heads)]
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    times = []
    for _ in range(args.repeats):
        began = time.process_time()
        grads = torch.autograd.grad(make(ids)(*inputs).square().sum(), inputs)
        times.append(time.process_time() - began)
    with Meter() as meter:
        meter.begin()
        torch.autograd.grad(make(ids)(*inputs).square().sum(), inputs)
    return min(times), meter.peak, list(grads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("seq", 4096), ("documents", 8), ("heads", 4), ("kv-heads", 2), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    (dense_s, dense_bytes, dense), (own_s, own_bytes, own) = (measure(f, args) for f in (by_mask, by_documents))
    gap = max(float((a - b).norm() / b.norm()) for a, b in zip(own, dense, strict=True))
    found = {
        "seq": args.seq, "documents": args.documents, "heads": args.heads, "kv_heads": args.kv_heads,
        "mask_cpu_s": dense_s, "documents_cpu_s": own_s, "ratio": dense_s / own_s,
        "mask_peak_bytes": dense_bytes, "documents_peak_bytes": own_bytes, "gradients_apart": gap,
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
