"""What a save costs: the stall of an asynchronous save against a synchronous one, and against the disk itself.

    python profiling/checkpoint_bench.py --gib 1 --folder DIR

One process holds a state of the given size. In the same run and on the same disk, in turn: plain sequential
writes of as many bytes (one file, 8 MiB at a time, fsync), synchronous saves, and asynchronous ones. Medians of
``--repeat``. The hash alone is timed too: on a processor without SHA instructions it, not the disk, is the limit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from trainsys.checkpoint.container import CHUNK
from trainsys.checkpoint.folder import Folder
from trainsys.checkpoint.ranks import Ranks
from trainsys.checkpoint.saver import Progress, Saver
from trainsys.config.run import CheckpointConfig
from trainsys.engines.base import LocalTensor
from trainsys.models.shards import ShardSpec


def plain_write(folder: Path, data: memoryview) -> float:
    """Seconds of one sequential, durable write."""
    path = folder / "plain.bin"
    began = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(data), CHUNK):
            file.write(data[start : start + CHUNK])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="ckpt-bench-", dir=args.folder))
    tensor_bytes = 32 << 20
    count = max(1, int(args.gib * 2**30) // tensor_bytes)
    state = []
    for i in range(count):
        data = torch.randn(tensor_bytes // 4 // 1024, 1024)
        state.append(LocalTensor(f"layers.{i}.weight", data, ShardSpec.whole(data.shape)))
    size = count * tensor_bytes
    flat = memoryview(bytearray(size))

    def saver(mode: str) -> Saver:
        cfg = CheckpointConfig(mode=mode, keep_last=1)
        return Saver(cfg, Folder(base / mode), Ranks(), lambda: state, {})

    plain, sync, stall, commit = [], [], [], []
    savers = {mode: saver(mode) for mode in ("sync", "async")}
    for mode in savers:  # memory is taken and pages are touched once a run, not once a save
        savers[mode].save(Progress(0, 0, 0), wait=True)
    for i in range(1, args.repeat + 1):
        plain.append(plain_write(base, flat))
        began = time.perf_counter()
        savers["sync"].save(Progress(i, i, i))
        sync.append(time.perf_counter() - began)
        plain.append(plain_write(base, flat))
        began = time.perf_counter()
        savers["async"].save(Progress(i, i, i))
        stall.append(time.perf_counter() - began)
        savers["async"].wait()
        commit.append(time.perf_counter() - began)
    for one in savers.values():
        one.close()
    began = time.perf_counter()
    hashlib.sha256(flat[: 256 << 20]).digest()
    hash_gbs = min(size, 256 << 20) / (time.perf_counter() - began) / 1e9
    shutil.rmtree(base)
    median = statistics.median
    result = {
        "state_gib": size / 2**30,
        "plain_write_s": median(plain),
        "sync_save_s": median(sync),
        "async_stall_s": median(stall),
        "async_commit_s": median(commit),
        "stall_share_of_sync": median(stall) / median(sync),
        "throughput_share_of_plain": median(plain) / median(commit),
        "plain_write_GBps": size / median(plain) / 1e9,
        "sha256_GBps_one_thread": hash_gbs,
        "load_average": os.getloadavg()[0],
        "cores": os.cpu_count(),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
