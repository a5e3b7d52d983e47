"""FLOPs of an operator from the shapes the profiler recorded; a multiply-add is 2.

Matrix products exactly. Convolutions are not counted: their stride is not among the recorded shapes.
Attention is counted in full (no causal halving), because a trace does not say which mask was used, and kept
apart from the products for that reason.
"""

from __future__ import annotations

from math import prod

Dims = tuple[tuple[int, ...], ...]


def _mm(d: Dims) -> int:
    (m, k), (k2, n) = d[0], d[1]
    return 2 * m * k * n if k == k2 else 0


def _addmm(d: Dims) -> int:
    return _mm(d[1:3])


def _bmm(d: Dims) -> int:
    (b, m, k), (b2, k2, n) = d[0], d[1]
    return 2 * b * m * k * n if (b, k) == (b2, k2) else 0


def _baddbmm(d: Dims) -> int:
    return _bmm(d[1:3])


def _attention(d: Dims) -> int:
    """Q [B, H, S, E], K [B, K, T, E], V [B, K, T, F]: QK^T and PV, 2 B H S T (E + F)."""
    q, k, v = d[0], d[1], d[2]
    return 2 * prod(q[:-2]) * q[-2] * k[-2] * (q[-1] + v[-1])


def _flash(d: Dims) -> int:
    """As ``_attention`` with the sequence before the heads: Q [B, S, H, E]."""
    q, k, v = d[0], d[1], d[2]
    return 2 * q[0] * q[2] * q[1] * k[1] * (q[3] + v[3])


def _attention_backward(d: Dims) -> int:
    """dO first, then Q, K, V: five products against the forward's two."""
    return _attention(d[1:4]) * 5 // 2


def _flash_backward(d: Dims) -> int:
    return _flash(d[1:4]) * 5 // 2


COUNTED = {
    "aten::mm": _mm,
    "aten::addmm": _addmm,
    "aten::addmm_": _addmm,
    "aten::bmm": _bmm,
    "aten::baddbmm": _baddbmm,
    "aten::_scaled_mm": _mm,
    "aten::_scaled_dot_product_flash_attention": _attention,
    "aten::_scaled_dot_product_efficient_attention": _attention,
    "aten::_scaled_dot_product_cudnn_attention": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_backward": _attention_backward,
    "aten::_scaled_dot_product_efficient_attention_backward": _attention_backward,
    "aten::_scaled_dot_product_cudnn_attention_backward": _attention_backward,
    "flash_attn::_flash_attn_forward": _flash,
    "flash_attn::_flash_attn_backward": _flash_backward,
}
MATMUL = frozenset(n for n in COUNTED if "mm" in n.split("::")[1].split("_")[-1])


def flops(name: str, dims: Dims) -> int:
    """FLOPs of one call; 0 where the recorded shapes do not fit the operator."""
    try:
        return max(0, COUNTED[name](dims))
    except (KeyError, ValueError, IndexError, TypeError):
        return 0


def moved_bytes(name: str, dims: Dims, element: int) -> int:
    """Least bytes a matrix product must read and write: operands and result once each. 0 if unknown."""
    if name not in MATMUL or not flops(name, dims):
        return 0
    a, b = (dims[1], dims[2]) if "add" in name else (dims[0], dims[1])
    return element * (prod(a) + prod(b) + prod(a[:-1]) * b[-1])


ELEMENT_BYTES = {
    "float": 4,
    "double": 8,
    "c10::BFloat16": 2,
    "c10::Half": 2,
    "Float": 4,
    "BFloat16": 2,
    "Half": 2,
    "Double": 8,
    "Int": 4,
    "Long": 8,
    "int": 4,
    "long int": 8,
    "Byte": 1,
    "Char": 1,
    "Bool": 1,
    "bool": 1,
    "Short": 2,
    "Float8_e4m3fn": 1,
    "Float8_e5m2": 1,
    "c10::Float8_e4m3fn": 1,
    "c10::Float8_e5m2": 1,
    "signed char": 1,
    "unsigned char": 1,
}
