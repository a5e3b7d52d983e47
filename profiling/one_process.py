"""Is a trainsys step in one process as fast as a bare PyTorch loop? Alternating, in one run, same weights.

usage: python profiling/one_process.py [--rounds 15] [--steps 4] [--json FILE]

Prints the ratio of median step times (trainsys / bare; below 1 is faster) with all telemetry on, and checks
that both loops give the same losses.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import bare
import torch
from recorded import record

from trainsys.config.loader import load_run
from trainsys.data import Loader, build_source
from trainsys.engines.native import NativeEngine
from trainsys.layout import Layout
from trainsys.parallel.mesh import Mesh
from trainsys.telemetry.recorder import Recorder, here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4, help="steps of each loop in a round")
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cfg = load_run(
        "train/demo",
        [
            "parallel.dp_shard=1", "parallel.tp=1", "data.source=synthetic", "train.seq_len=256",
            "train.global_batch=4", "train.micro_batch=4", "optim.schedule=constant", "optim.warmup_steps=0",
            "optim.weight_decay=0.0", *args.overrides,
        ],
    )  # fmt: skip
    layout = Layout()
    mesh = Mesh(layout, torch.device("cpu"))
    recorder = Recorder(tempfile.mkdtemp(), here(run_id="bench", rank=0, world=1))
    mesh.ledger.recorder = recorder
    engine = NativeEngine(cfg, mesh, recorder)
    m = cfg.model
    model = bare.Llama(m.n_layers, m.d_model, m.n_heads, m.kv_heads, m.d_ff, m.vocab, m.norm_eps)
    model.load_state_dict({bare.rename(t.name): t.data.clone() for t in engine.parameters()})
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.optim.lr, betas=cfg.optim.betas, eps=cfg.optim.eps, weight_decay=0.0, fused=True
    )
    ours = Loader(build_source(cfg), layout, 0, cfg.train.micro_batch)
    theirs = Loader(build_source(cfg), layout, 0, cfg.train.micro_batch)
    times: dict[str, list[float]] = {"trainsys": [], "bare": []}
    losses: dict[str, list[float]] = {"trainsys": [], "bare": []}
    recorder.begin()
    step = 0
    for _ in range(args.rounds):
        for i in range(args.steps):
            t0 = time.perf_counter()
            with recorder.phase("data"):
                data = next(ours)
            result = engine.train_step(step + i, data)
            loss, norm = result.scalars.tolist()
            recorder.end_step(step + i, tokens=1, loss=loss, grad_norm=norm)
            times["trainsys"].append(time.perf_counter() - t0)
            losses["trainsys"].append(loss)
        for _ in range(args.steps):
            t0 = time.perf_counter()
            (batch,) = next(theirs).micro_batches
            tokens, labels = torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)
            losses["bare"].append(bare.train_step(model, optimizer, tokens, labels))
            times["bare"].append(time.perf_counter() - t0)
        step += args.steps
    ours.close(), theirs.close()
    drift = max(abs(a / b - 1) for a, b in zip(losses["trainsys"], losses["bare"], strict=True))
    assert drift < 1e-4, f"the two loops do not train alike: losses differ by {drift:.1e}"
    median = {k: statistics.median(v[args.steps :]) for k, v in times.items()}
    # Adjacent blocks saw the same machine: their ratios are less noisy than the ratio of medians.
    blocks = range(1, args.rounds)
    n = args.steps
    pairs = [min(times["trainsys"][b * n : b * n + n]) / min(times["bare"][b * n : b * n + n]) for b in blocks]
    result = {
        "median_step_s": median,
        "ratio_of_medians": median["trainsys"] / median["bare"],
        "median_of_block_ratios": statistics.median(pairs),
        "largest_loss_difference": drift,
        "torch": torch.__version__,
    }
    record(result, args.json)


if __name__ == "__main__":
    main()
