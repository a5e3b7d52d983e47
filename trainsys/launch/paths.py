"""What a run reads that its config names by a path: checked before a job is sent, made absolute, mounted."""

from __future__ import annotations

from trainsys.config.run import RunConfig


def inputs(run: RunConfig) -> dict[str, str]:
    """By key. A value may also be the name of a data set, of a tokenizer or of a cluster: who asks knows what of it is
    a path."""
    resume = run.checkpoint.resume
    named = {
        "data.path": run.data.path,
        "data.tokenizer": None if run.data.tokenizer == "bytes" else run.data.tokenizer,
        "checkpoint.resume": None if resume in ("auto", "never") else resume,
        "train.init_from": run.train.init_from,
    }
    return {key: text for key, text in named.items() if text}
