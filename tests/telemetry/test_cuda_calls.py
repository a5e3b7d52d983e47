"""What a step asks of a device is bounded: nothing is made anew once it is warm, nothing is waited for by the host."""

from __future__ import annotations

import pytest

from support.apart import apart
from support.cuda_spy import calls_by_step
from trainsys.config.loader import load_run

BASE = ["data.source=synthetic", "model.n_layers=2", "train.seq_len=64", "train.micro_batch=1", "train.device=cpu"]
CASES = {
    "fsdp": (2, ("parallel.dp_shard=2", "parallel.tp=1")),
    "tp": (2, ("parallel.dp_shard=1", "parallel.tp=2")),
    "replicas": (2, ("parallel.dp_replicate=2", "parallel.dp_shard=1", "parallel.tp=1")),
}


def steps_of(name: str, micro_batches: int) -> list[dict[str, int]]:
    world, sizes = CASES[name]
    rows = micro_batches * (1 if name == "tp" else 2)
    return calls_by_step(load_run("train/demo", [*BASE, *sizes, f"train.global_batch={rows}"]), world, 4)


@pytest.mark.parametrize("name", CASES)
def test_a_warm_step_makes_nothing_and_waits_for_nothing(name: str) -> None:
    one, four = (apart(steps_of, name, n) for n in (1, 4))
    for steps in (one, four):
        warm = steps[-1]
        assert warm == steps[-2], "each warm step calls the same"
        assert warm["mark recorded"] > 5, "there is something to count"
        assert warm.get("mark made", 0) == 0, "marks are used again"
        assert warm.get("stream made", 0) == 0
        assert not [call for call in warm if "synchronised" in call]
        # Each is asked once whether the device is there, and read once or twice: never in a loop.
        assert warm["mark queried"] <= warm["mark recorded"] + 2
        assert warm["mark read"] <= 2 * warm["mark recorded"] + 2
    grows = four[-1]["mark recorded"] / one[-1]["mark recorded"]
    assert 1 < grows <= 4.0, "marks are by micro-batch at most"
