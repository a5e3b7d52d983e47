"""What ranks tell each other beside training costs: file descriptors of gloo's groups, and the tree's bytes and time.

    python profiling/side_traffic.py [--ranks 2048] [--write]

``gloo``: real processes, descriptors after a sum over the world, with eager and with lazy connections.
``tree``: so many ranks as threads of this process over real sockets of the loopback: bytes are exact, seconds are
those of one interpreter for all of them and so an upper bound.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import resource
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainsys.checkpoint.ranks import _pack
from trainsys.comm.tree import Tree
from trainsys.comm.wire import Wire
from trainsys.telemetry.vectors import VECTOR

RESULT = Path(__file__).parent / "results" / "side_traffic.json"
GLOO = (4, 8, 16)


def _gloo_rank(rank: int, world: int, store: str, lazy: bool, answers: Any) -> None:
    torch.set_num_threads(1)
    os.environ["TORCH_GLOO_LAZY_INIT"] = str(int(lazy))
    before = len(os.listdir("/proc/self/fd"))
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    dist.all_reduce(torch.ones(1 << 16))
    answers.put(len(os.listdir("/proc/self/fd")) - before)
    dist.barrier()
    os._exit(0)


def gloo(world: int, lazy: bool) -> int:
    """Most descriptors that a rank of ``world`` has opened."""
    context = mp.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        answers = context.SimpleQueue()
        ranks = [
            context.Process(target=_gloo_rank, args=(rank, world, f"{folder}/store", lazy, answers))
            for rank in range(world)
        ]
        for each in ranks:
            each.start()
        most = max(answers.get() for _ in ranks)
        for each in ranks:
            each.join()
    return most


def tree(world: int, payload: bytes) -> dict[str, Any]:
    """A gather of ``payload`` from every rank, then a broadcast of it."""
    store, clock = dist.HashStore(), {}
    threading.stack_size(256 << 10)
    ready = threading.Barrier(world + 1)

    def rank(number: int) -> int:
        wire = Wire(store, "side", number, 300.0)
        ends = Tree(wire, world)
        ready.wait()
        got = ends.gather(payload)
        ready.wait()
        ends.broadcast(payload if number == 0 else b"")
        ready.wait()
        if number == 0:
            clock["at_root"] = sum(map(len, got)) - len(payload)
        sent = ends.sent_bytes
        ends.close()
        wire.close()
        return sent

    began = time.perf_counter()
    with ThreadPoolExecutor(world) as pool:
        done = [pool.submit(rank, number) for number in range(world)]
        times = []
        for _ in range(3):
            ready.wait()
            times.append(time.perf_counter())
        sent = [each.result() for each in done]
    return {
        "ranks": world,
        "bytes_a_rank": len(payload),
        "bytes_to_rank_0": clock["at_root"],
        "most_bytes_sent_by_a_rank": max(sent),
        "connect_s": round(times[0] - began, 2),
        "gather_s": round(times[1] - times[0], 3),
        "broadcast_s": round(times[2] - times[1], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2048)
    parser.add_argument("--write", action="store_true", help=f"into {RESULT.name}")
    args = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    found: dict[str, Any] = {
        "gloo_descriptors_a_rank": {
            kind: {str(world): gloo(world, lazy) for world in GLOO} for kind, lazy in (("eager", False), ("lazy", True))
        }
    }
    found["window"] = tree(args.ranks, _pack(np.random.default_rng(0).random(len(VECTOR))))
    # A rank's part of a manifest: 200 atoms by name, dtype, shape, box, file and offset.
    box = ((0, 16), (0, 4096))
    part = [((f"layers.{i}.attn.wq.weight@exp_avg", "F32", (4096, 4096), box), 0, i) for i in range(200)]
    found["manifest_part"] = tree(args.ranks, _pack(part))
    found["load"] = [round(x, 1) for x in os.getloadavg()]
    text = json.dumps(found, indent=1)
    print(text)
    if args.write:
        RESULT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
