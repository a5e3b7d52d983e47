"""Initial weights depend on the seed, the name and the place, and on nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from support.apart import apart
from support.ranks import run_ranks
from trainsys.config.model import ModelConfig
from trainsys.models.decoder import Decoder
from trainsys.models.init import canonical_name, init_weights, local_part
from trainsys.models.shards import ShardSpec

CFG = ModelConfig(
    n_layers=2, d_model=320, n_heads=4, n_kv_heads=2, d_ff=600, vocab=300, qkv_bias=True, qk_norm=True
)


def weights(seed: int = 0, cfg: ModelConfig = CFG) -> dict[str, torch.Tensor]:
    model = Decoder(cfg)
    init_weights(model, cfg, seed)
    return {name: p.detach() for name, p in model.named_parameters()}


class Held(nn.Module):
    """A module with one parameter, of the name and the local shape given."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        owner: nn.Module = self
        *path, last = name.split(".")
        for part in path:
            owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(last, nn.Parameter(torch.empty(shape, dtype=dtype)))


def part(name: str, spec: ShardSpec, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    held = Held(name, spec.local_shape, dtype)
    init_weights(held, CFG, seed, {name: spec})
    return next(held.parameters()).detach()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_shard_is_the_slice_of_the_whole(data):
    dims = data.draw(st.sampled_from([2, 2, 3]))
    shape = tuple(data.draw(st.lists(st.integers(1, 600 if dims == 2 else 270), min_size=2, max_size=2)))
    shape = (*[3] * (dims - 2), *shape)
    spec = ShardSpec.whole(shape)
    for dim, size in enumerate(shape):
        start = data.draw(st.integers(0, size))
        spec = spec.narrow(dim, start, data.draw(st.integers(start, size)))
    name = "layers.0.ffn.w_up.weight"
    whole = part(name, ShardSpec.whole(shape))
    box = tuple(slice(a, b) for a, b in spec.bounds)
    assert torch.equal(part(name, spec), whole[box])


def test_only_tiles_of_the_shard_are_drawn(monkeypatch):
    """A rank of a huge embedding does the work, and holds the memory, of its own part."""
    drawn = []
    real = np.random.Philox
    monkeypatch.setattr(np.random, "Philox", lambda key: drawn.append(key) or real(key=key))
    spec = ShardSpec((128_256, 16_384), ((64_000, 64_100), (8192, 8292)))
    assert part("embed.weight", spec).shape == (100, 100)
    assert 1 <= len(drawn) <= 4


def test_threads_change_nothing():
    assert np.array_equal(apart(_drawn_by, 3), part("embed.weight", ShardSpec.whole((700, 600))))


def _drawn_by(threads):
    torch.set_num_threads(threads)
    return part("embed.weight", ShardSpec.whole((700, 600))).numpy()


def test_seed_and_name_each_give_other_numbers_and_the_same_ones_again():
    first, again, other = weights(0), weights(0), weights(1)
    matrices = [name for name, p in first.items() if p.dim() == 2]
    for name, p in first.items():
        assert torch.equal(p, again[name])
        assert torch.equal(p, other[name]) == (name not in matrices)
    square = part("layers.0.attn.wq.weight", ShardSpec.whole((300, 300)))
    for name in ("layers.1.attn.wq.weight", "layers.0.attn.wk.weight", "embed.weight"):
        unlike = part(name, ShardSpec.whole((300, 300)))
        correlation = torch.corrcoef(torch.stack((square.flatten(), unlike.flatten())))[0, 1]
        assert abs(correlation) < 5 / 300
    tiles = square[:44, :44].flatten(), square[256:, 256:].flatten()
    assert abs(torch.corrcoef(torch.stack(tiles))[0, 1]) < 5 / 44


def test_the_numbers_are_these():
    """Runs that were started by an older version go on from the same weights: a change here is a break."""
    got = part("embed.weight", ShardSpec.whole((4, 3)), seed=7)[0] / CFG.init_std
    torch.testing.assert_close(got, torch.tensor([0.1207713, -0.2779523, 0.4153516]), rtol=1e-5, atol=1e-6)


def test_means_and_deviations():
    for name, p in weights().items():
        if name.endswith("bias"):
            assert not p.any()
        elif "norm" in name:
            assert (p == 1).all()
        else:
            std = 0.02 / math.sqrt(2 * 2) if ("wo" in name or "w_down" in name) else 0.02
            n = p.numel()
            assert abs(p.mean().item()) < 5 * std / math.sqrt(n), name
            assert p.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n)), name
            kurtosis = ((p / std) ** 4).mean().item()
            assert kurtosis == pytest.approx(3, abs=5 * math.sqrt(96 / n)), f"{name} is not normal"


def test_bf16_parameters_are_the_fp32_ones_rounded():
    spec = ShardSpec.along((300, 300), 0, 10, 290)
    wide = part("embed.weight", spec)
    assert torch.equal(part("embed.weight", spec, dtype=torch.bfloat16), wide.bfloat16())


def test_a_meta_model_is_given_memory_first():
    with torch.device("meta"):
        model = Decoder(CFG)
    init_weights(model, CFG, 0, device="cpu")
    for name, want in weights().items():
        assert torch.equal(model.get_parameter(name), want)


def test_a_shape_that_contradicts_its_spec_is_a_defect():
    held = Held("embed.weight", (4, 4))
    with pytest.raises(AssertionError, match=r"embed\.weight"):
        init_weights(held, CFG, 0, {"embed.weight": ShardSpec.along((8, 4), 0, 0, 3)})


def test_a_parameter_without_a_rule_is_a_defect():
    with pytest.raises(AssertionError, match="no rule"):
        init_weights(Held("layers.0.mystery.weight", (4, 4)), CFG, 0)


def test_wrappers_do_not_change_a_name():
    wrapped = "layers.0._checkpoint_wrapped_module._orig_mod.attn.wq.weight"
    assert canonical_name(wrapped) == "layers.0.attn.wq.weight"


def fsdp_on_rank(dims: tuple[int, ...]) -> list[tuple[str, torch.Tensor, ShardSpec]]:
    """Runs on each gloo rank: shard as (replicate ×) fsdp, initialise, and say what is held where.

    The first tensor-parallel half of the output rows of ``wq`` stands for a sliced parameter.
    """
    names = ("fsdp",) if len(dims) == 1 else ("dp_replicate", "fsdp")
    with torch.device("meta"):
        model = Decoder(CFG)
        model.layers["0"].attn.wq.weight = nn.Parameter(torch.empty(160, 320))
    shards = {"layers.0.attn.wq.weight": ShardSpec.along((320, 320), 0, 160, 320)}
    fully_shard(model, mesh=init_device_mesh("cpu", dims, mesh_dim_names=names))
    init_weights(model, CFG, 0, shards, device="cpu")
    out = []
    for name, param in model.named_parameters():
        local, spec = local_part(param, shards.get(name) or ShardSpec.whole(param.shape))
        out.append((name, local.detach().clone(), spec))
    return out


@pytest.mark.parametrize("dims", [(3,), (2, 2)], ids=["fsdp", "hsdp"])
def test_fsdp_shards_are_slices_of_the_whole(dims):
    whole = weights()
    covered = {name: torch.zeros(p.shape, dtype=torch.int64) for name, p in whole.items()}
    for held in run_ranks(math.prod(dims), fsdp_on_rank, dims):
        for name, local, spec in held:
            box = tuple(slice(a, b) for a, b in spec.bounds)
            assert torch.equal(local, whole[name][box]), name
            covered[name][box] += 1
    copies = dims[0] if len(dims) == 2 else 1
    for name, times in covered.items():
        want = torch.full_like(times, copies)
        if name == "layers.0.attn.wq.weight":
            want[:160] = 0
        assert torch.equal(times, want), name
