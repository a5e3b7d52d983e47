"""Initial weights as a pure function of (seed, parameter name, place in the full parameter).

A full parameter is cut into tiles of 256 x 256 over its last two dims, and each tile has its own generator
(Philox, Salmon et al. 2011), keyed by a hash of the seed, the name and the tile's place. A rank makes the
tiles that its shard touches and no others, so every layout starts from the same numbers and no rank ever
holds more of a parameter than it owns. The numbers come from the CPU whatever the model's device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from trainsys.config.model import ModelConfig
from trainsys.models.shards import ShardSpec

_TILE = 256

# Wrappers of recomputation and compilation that put themselves into parameter names.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def init_weights(
    model: nn.Module,
    cfg: ModelConfig,
    seed: int,
    shards: Mapping[str, ShardSpec] | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Fill every parameter of ``model`` in place, and its buffers, which count or balance, with zeros.

    ``shards``: canonical name -> the part of the full parameter that the module's (tensor-parallel) parameter
    is; a name that is absent is whole. An FSDP2 parameter is a further shard of that, which is found from its
    placements. ``device``: first give a model that is on the meta device memory there.
    """
    if device is not None and any(p.is_meta for p in model.parameters()):
        model.to_empty(device=device)
    shards = shards or {}
    with torch.no_grad():
        for wrapped_name, param in model.named_parameters():
            name = canonical_name(wrapped_name)
            local, spec = local_part(param, shards.get(name) or ShardSpec.whole(param.shape))
            assert tuple(local.shape) == spec.local_shape, f"{name}: {tuple(local.shape)} is not {spec}"
            fill(local, spec, name, cfg, seed)
        for buffer in model.buffers():
            buffer.zero_()


def initial_value(name: str, shape: Sequence[int], cfg: ModelConfig, seed: int) -> Tensor:
    """The whole of one parameter as `init_weights` makes it, fp32 on the CPU."""
    out = torch.empty(tuple(shape), device="cpu")
    fill(out, ShardSpec.whole(shape), name, cfg, seed)
    return out


def canonical_name(name: str) -> str:
    """A parameter's name without what wrappers have added to it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _distribution(name: str, cfg: ModelConfig) -> tuple[float, float]:
    """(mean, std): norms 1, biases 0, matrices N(0, init_std), and those that write to the residual stream
    N(0, init_std / sqrt(2 n_layers)) (Radford et al. 2019, GPT-2, section 2.3)."""
    module, kind = name.split(".")[-2:]
    if module == "experts":  # stacked: the matrix itself has the name that a linear's module has
        module = kind
    if kind == "bias":
        return 0.0, 0.0
    if module == "norm" or module.endswith("_norm"):
        return 1.0, 0.0
    if module in ("wo", "w_down"):
        return 0.0, cfg.init_std / math.sqrt(2 * cfg.n_layers)
    known = ("embed", "head", "wq", "wk", "wv", "w_gate", "w_up", "router")
    assert module in known, f"no rule to initialise {name}"
    return 0.0, cfg.init_std


def fill(local: Tensor, spec: ShardSpec, name: str, cfg: ModelConfig, seed: int) -> None:
    """Give ``local``, which is the part ``spec`` of the parameter ``name``, its initial values in place."""
    constant, std = _distribution(name, cfg)
    if std:
        _fill_normal(local, spec, seed, name, std)
    else:
        local.fill_(constant)


def local_part(param: Tensor, spec: ShardSpec) -> tuple[Tensor, ShardSpec]:
    """The plain tensor this rank holds of ``param``, and its place in the full parameter.

    ``spec``: the place of ``param`` as the module declares it, before FSDP2 cut it further.
    FSDP2 cuts as ``torch.chunk`` does: ceil(n / ranks) each, the last ones fewer or none.
    """
    if not isinstance(param, DTensor):
        return param, spec
    for axis, placement in enumerate(param.placements):
        if isinstance(placement, Shard):
            size = spec.local_shape[placement.dim]
            chunk = -(-size // param.device_mesh.size(axis))
            start = min(param.device_mesh.get_local_rank(axis) * chunk, size)
            spec = spec.narrow(placement.dim, start, min(start + chunk, size))
        else:
            assert isinstance(placement, Replicate), f"cannot place {placement}"
    return param.to_local(), spec


def _fill_normal(local: Tensor, spec: ShardSpec, seed: int, name: str, std: float) -> None:
    if local.numel() == 0:
        return
    direct = local.device.type == "cpu" and local.dtype == torch.float32
    staging = local.detach() if direct else torch.empty(local.shape, dtype=torch.float32)
    target = staging.numpy()
    edges = [1] * (len(spec.full_shape) - 2) + [_TILE] * min(len(spec.full_shape), 2)
    tiles = [
        range(start // edge, -(-stop // edge)) for (start, stop), edge in zip(spec.bounds, edges, strict=True)
    ]

    def draw(tile: tuple[int, ...]) -> None:
        low = [t * edge for t, edge in zip(tile, edges, strict=True)]
        shape = [min(edge, n - at) for n, at, edge in zip(spec.full_shape, low, edges, strict=True)]
        values = _generator(seed, name, tile).standard_normal(shape, dtype=np.float32)
        values *= std
        source, into = [], []
        for at, n, (start, stop) in zip(low, shape, spec.bounds, strict=True):
            first, last = max(at, start), min(at + n, stop)
            source.append(slice(first - at, last - at))
            into.append(slice(first - start, last - start))
        target[tuple(into)] = values[tuple(source)]

    threads = torch.get_num_threads()
    if threads == 1 or local.numel() <= _TILE**2:
        for tile in product(*tiles):
            draw(tile)
    else:  # numpy releases the interpreter lock while it draws
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(draw, product(*tiles)))
    if not direct:
        local.copy_(staging)


def _generator(seed: int, name: str, tile: tuple[int, ...]) -> np.random.Generator:
    key = blake2b(repr((seed, name, tile)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
