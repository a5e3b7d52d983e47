"""What a save costs: the stall of an asynchronous save against a synchronous one, and against the disk itself.

    python profiling/checkpoint_bench.py --gib 1 --folder DIR --out profiling/results/checkpoint_bench.json

One process holds a state of the given size. In the same run and on the same disk, in turn: plain sequential
writes of as many bytes (one file, 8 MiB at a time, fsync), synchronous saves, and asynchronous ones. Medians of
``--repeat``; shares are medians of each turn's own. A save's time is from its call to its commit: the copy into
memory, sha256 of every byte, files, manifest, fsyncs and the rename. The hash alone is timed too, by one hashlib
and as saves do it: on a processor without SHA instructions it, not the disk, would be the limit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from recorded import record

from trainsys.checkpoint.container import CHUNK
from trainsys.checkpoint.folder import Folder
from trainsys.checkpoint.lanes import LANES, sha256_each
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
    parser.add_argument("--repeat", type=int, default=5)
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
        cfg = CheckpointConfig(mode=mode)
        return Saver(cfg, Folder(base / mode), Ranks(), lambda: state, {})

    savers = {mode: saver(mode) for mode in ("sync", "async")}
    for mode in savers:  # memory is taken and pages are touched once a run, not once a save
        savers[mode].save(Progress(0, 0, 0), wait=True)
    turns: list[dict[str, float]] = []
    for i in range(1, args.repeat + 1):
        turn = {"plain_s": plain_write(base, flat)}
        began = time.perf_counter()
        savers["sync"].save(Progress(i, i, i))
        turn["sync_s"] = time.perf_counter() - began
        turn["plain_again_s"] = plain_write(base, flat)
        began = time.perf_counter()
        savers["async"].save(Progress(i, i, i))
        turn["stall_s"] = time.perf_counter() - began
        savers["async"].wait()
        turn["commit_s"] = time.perf_counter() - began
        turns.append({k: round(v, 4) for k, v in turn.items()})
        print(turns[-1], flush=True)
    for one in savers.values():
        one.close()
    part = size // LANES
    began = time.perf_counter()
    hashlib.sha256(flat[: 4 * part]).digest()
    one_gbs = 4 * part / (time.perf_counter() - began) / 1e9
    began = time.perf_counter()
    sha256_each([[flat[i * part : (i + 1) * part]] for i in range(LANES)])
    each_gbs = LANES * part / (time.perf_counter() - began) / 1e9
    shutil.rmtree(base)

    def median(of: Callable[[dict[str, float]], float]) -> float:
        return round(statistics.median(map(of, turns)), 4)

    def plain(turn: dict[str, float]) -> float:
        return (turn["plain_s"] + turn["plain_again_s"]) / 2

    result = {
        "state_gib": size / 2**30,
        "plain_write_s": median(plain),
        "sync_save_s": median(lambda t: t["sync_s"]),
        "async_stall_s": median(lambda t: t["stall_s"]),
        "async_commit_s": median(lambda t: t["commit_s"]),
        "stall_share_of_sync": median(lambda t: t["stall_s"] / t["sync_s"]),
        "throughput_share_of_plain": median(lambda t: plain(t) / t["commit_s"]),
        "plain_write_GBps": round(size / median(plain) / 1e9, 3),
        "sha256_GBps_one_hashlib": round(one_gbs, 3),
        "sha256_GBps_as_saves_do_it": round(each_gbs, 3),
        "turns": turns,
        "load_average": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "command": "python profiling/checkpoint_bench.py --gib 1",
    }
    record(result, args.out)


if __name__ == "__main__":
    main()
