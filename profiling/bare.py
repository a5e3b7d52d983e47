"""The plainest PyTorch loop that trains the same decoder: what trainsys is measured against in one process.

Written as one would by hand, with nothing but torch: nn.Linear, scaled_dot_product_attention, AdamW(fused),
clip_grad_norm_. Not used by the package.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Norm(nn.Module):
    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Layer(nn.Module):
    def __init__(self, d: int, heads: int, kv_heads: int, d_ff: int, eps: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dh = heads, kv_heads, d // heads
        self.n1, self.n2 = Norm(d, eps), Norm(d, eps)
        self.q = nn.Linear(d, heads * self.dh, bias=False)
        self.k = nn.Linear(d, kv_heads * self.dh, bias=False)
        self.v = nn.Linear(d, kv_heads * self.dh, bias=False)
        self.o = nn.Linear(heads * self.dh, d, bias=False)
        self.gate, self.up = nn.Linear(d, d_ff, bias=False), nn.Linear(d, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, _ = x.shape
        h = self.n1(x)
        q = rotate(self.q(h).view(b, s, self.heads, self.dh), cos, sin).transpose(1, 2)
        k = rotate(self.k(h).view(b, s, self.kv_heads, self.dh), cos, sin).transpose(1, 2)
        v = self.v(h).view(b, s, self.kv_heads, self.dh).transpose(1, 2)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x = x + self.o(a.transpose(1, 2).reshape(b, s, -1))
        h = self.n2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Llama(nn.Module):
    def __init__(self, n_layers: int, d: int, heads: int, kv_heads: int, d_ff: int, vocab: int, eps: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.layers = nn.ModuleList(Layer(d, heads, kv_heads, d_ff, eps) for _ in range(n_layers))
        self.norm, self.head = Norm(d, eps), nn.Linear(d, vocab, bias=False)
        self.dh = d // heads

    def forward(self, tokens: Tensor) -> Tensor:
        s = tokens.shape[1]
        inv = 10_000.0 ** (-torch.arange(0, self.dh, 2).float() / self.dh)
        angle = torch.outer(torch.arange(s).float(), inv)
        angle = torch.cat((angle, angle), dim=-1)[None, :, None, :]
        cos, sin = angle.cos(), angle.sin()
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.head(self.norm(x))


# From our canonical names to this model's.
NAMES = {
    "attn_norm": "n1", "ffn_norm": "n2", "attn.wq": "q", "attn.wk": "k", "attn.wv": "v", "attn.wo": "o",
    "ffn.w_gate": "gate", "ffn.w_up": "up", "ffn.w_down": "down",
}  # fmt: skip


def rename(name: str) -> str:
    """``layers.0.attn.wq.weight`` -> ``layers.0.q.weight``."""
    for ours, theirs in NAMES.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, labels: Tensor) -> float:
    """One step on one micro-batch; the mean loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(tokens).flatten(0, 1).float(), labels.flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
    optimizer.step()
    return loss.item()
