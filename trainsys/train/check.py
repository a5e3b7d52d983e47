"""What can be said of a run before its first step: folders that cannot be written, a model that the machine cannot hold,
and settings that surprise."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from trainsys.config.run import RunConfig
from trainsys.data import Source
from trainsys.errors import MachineFault, UserError
from trainsys.flops.params import param_counts
from trainsys.layout import Layout
from trainsys.optim.schedule import learning_rate

MOST_EPOCHS = 4
"""Up to four passes over data are nearly as good as new data (Muennighoff et al. 2023, arXiv:2305.16264, figure 3)."""

# What the path itself is wrong about, wherever the run is started; anything else is the disk's or the network's.
_THE_PATHS = {
    errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT,
    errno.ELOOP, errno.EINVAL,
}  # fmt: skip


def check_folders(cfg: RunConfig) -> None:
    """Make the folders that ``cfg`` writes to. UserError where one's path is no folder or cannot be written, MachineFault
    where its file system fails; each names the key."""
    checkpoint = cfg.checkpoint
    wanted = {
        "telemetry.out": cfg.telemetry.out,
        "checkpoint.folder": cfg.checkpoint_folder,
        "checkpoint.local_dir": checkpoint.local_dir,
        "checkpoint.memory_dir": checkpoint.memory_dir if checkpoint.memory_every else None,
    }
    for key, path in wanted.items():
        if path is None:
            continue
        if not path:
            raise UserError(f"{key} is empty; name a folder")
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
            if not os.access(path, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            shown = path if len(path) < 80 else f"{path[:60]}…"
            why = error.strerror
            if error.errno in (errno.EEXIST, errno.ENOTDIR):
                file = next(p for p in (Path(path), *Path(path).parents) if p.is_symlink() or p.exists())
                why = (
                    "it is a link to nothing"
                    if file.is_symlink() and not file.exists()
                    else f"{file} is a file"
                )
            fault = UserError if error.errno in _THE_PATHS else MachineFault
            raise fault(
                f"{key}={shown}: no folder can be made or written there ({why}); name a writable folder"
            ) from None


def check_weights(cfg: RunConfig, layout: Layout, local_world: int, has: int) -> None:
    """UserError where fp32 weights alone, at their smallest, are more than the ``has`` bytes that a machine has for its
    ``local_world`` ranks. Found before the model is built: a host that runs out of memory kills a rank without a word."""
    # Every axis but replication may shard them; none splits them further.
    least = 4 * param_counts(cfg.model).total * local_world * layout.dp_replicate // layout.world
    if least > has:
        raise UserError(
            f"out of memory before the first step: the model's fp32 weights alone take {least / 2**30:,.1f} GiB on a "
            f"machine with {local_world} of {layout.world} ranks, which has {has / 2**30:,.1f} GiB; a smaller model, or "
            "parallel.dp_shard over more machines; `trainsys plan` says what fits"
        )


def doubts(cfg: RunConfig, source: Source) -> Iterator[str]:
    """A line for each setting that works and is seldom meant."""
    optim, steps = cfg.optim, cfg.train.steps
    if optim.warmup_steps > steps:
        highest = learning_rate(optim, steps - 1, steps)
        yield (
            f"optim.warmup_steps={optim.warmup_steps} is longer than the run (train.steps={steps}): the learning rate "
            f"ends at {highest:.3g} and never reaches optim.lr={optim.lr:g}"
        )
    elif optim.schedule == "wsd" and optim.decay_steps and optim.warmup_steps + optim.decay_steps > steps:
        yield (
            f"optim.warmup_steps={optim.warmup_steps} and optim.decay_steps={optim.decay_steps} are together longer than "
            f"the run (train.steps={steps}): the learning rate falls from the end of the warm-up on, and jumps there"
        )
    epochs = steps * cfg.train.global_batch / source.n_samples
    if cfg.data.source != "synthetic" and epochs > MOST_EPOCHS:
        yield (
            f"this run reads its data {epochs:.3g} times: {source.n_samples:,} sequences of {cfg.train.seq_len} tokens, "
            f"and train.steps={steps} of train.global_batch={cfg.train.global_batch}; beyond {MOST_EPOCHS} times "
            "it gains little"
        )
