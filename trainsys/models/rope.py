"""Rotary position embedding (Su et al. 2021, RoFormer) and its stretching to longer sequences.

Pairs are (i, i + Dh/2), the layout of the Hugging Face checkpoints of Llama and Qwen; Meta's own files pair
neighbours and are permuted on import.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from trainsys.config.model import RopeConfig


@lru_cache
def inverse_frequencies(rope: RopeConfig, dim: int) -> tuple[float, ...]:
    """The Dh/2 angular frequencies, radians a position, highest first.

    - none: theta^(-2i/Dh) (Su et al. 2021, section 3.2.2);
    - linear: all divided by ``factor`` (Chen et al. 2023, position interpolation, eq. 4);
    - llama3: wavelengths beyond original/low_freq_factor divided by ``factor``, those below
      original/high_freq_factor kept, linear in between (Llama 3.1's reference code, ``apply_scaling``);
    - yarn: "NTK by parts" (Peng et al. 2023, YaRN, section 3.2) with a ramp that is linear in i, between the
      frequencies that rotate ``beta_fast`` times and ``beta_slow`` times over the original context (for Llama 32
      and 1, the paper's beta and alpha).
    """
    plain = [rope.theta ** (-2 * i / dim) for i in range(dim // 2)]
    if rope.scaling == "none":
        return tuple(plain)
    if rope.scaling == "linear":
        return tuple(f / rope.factor for f in plain)
    if rope.scaling == "llama3":
        return tuple(_mix(f, rope.factor, _llama3_keep(f, rope)) for f in plain)
    assert rope.scaling == "yarn"
    fast, slow = (_index_of_rotations(turns, rope, dim) for turns in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        fast, slow = math.floor(fast), math.ceil(slow)
    fast, slow = max(fast, 0), min(slow, dim - 1)
    ramp = slow - fast or 1e-3
    return tuple(_mix(f, rope.factor, 1 - _clamp((i - fast) / ramp)) for i, f in enumerate(plain))


def _llama3_keep(freq: float, rope: RopeConfig) -> float:
    rotations = rope.original_seq_len * freq / (2 * math.pi)
    return _clamp((rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor))


def _index_of_rotations(rotations: float, rope: RopeConfig, dim: int) -> float:
    """The (real) index i at which theta^(-2i/Dh) turns ``rotations`` times over the original context."""
    return dim * math.log(rope.original_seq_len / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))


def _mix(freq: float, factor: float, keep: float) -> float:
    return freq * keep + freq / factor * (1 - keep)


def _clamp(x: float) -> float:
    return min(max(x, 0.0), 1.0)


def frequencies(rope: RopeConfig, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`inverse_frequencies` as ``[Dh/2]`` on ``device``, which waits for the host: once a model, not once a step."""
    return torch.tensor(inverse_frequencies(rope, dim), dtype=dtype, device=device)


def rope_tables(
    rope: RopeConfig, dim: int, positions: Tensor, dtype: torch.dtype, freqs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin for ``positions [B, S]``, each ``[B, S, 1, Dh]`` in ``dtype`` (fp32 or more). ``freqs``: what
    `frequencies` gives for all of these, where it is kept.

    The first half of sin is negated, so that ``apply_rope`` is one roll and one fused multiply-add.
    """
    if freqs is None:
        freqs = frequencies(rope, dim, positions.device, dtype)
    angles = positions.to(dtype).unsqueeze(-1) * freqs
    scale = rope.temperature
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos), dim=-1).unsqueeze(-2), torch.cat((-sin, sin), dim=-1).unsqueeze(-2)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [B, S, H, Dh]`` by ``rope_tables``; computed in their dtype, returned in its own."""
    wide = x.to(cos.dtype)
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)
