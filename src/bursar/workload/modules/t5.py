"""T5: an encoder and a decoder with relative positions, RMSNorm, no biases, one table for all embeddings and the head.

    B batch   S source   T target   D model   V vocabulary

Source: Raffel et al. 2019 (arXiv:1910.10683), section 2.1, the first release (ReLU, tied head scaled by 1/sqrt(D)); no
dropout. Attention is not scaled, and carries a learned bias per head and bucket of distance, shared by the layers of a
stack, so it runs with a dense mask.
"""

# ruff: noqa: D102 (what a forward takes and gives stands in its class docstring)

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bursar.workload.modules.llama import RMSNorm

BUCKETS, FARTHEST = 32, 128  # section 2.1: 32 embeddings, logarithmic up to 128


def buckets(queries: int, keys: int, both_ways: bool, device: torch.device) -> Tensor:
    """The bucket of each distance key - query. (queries, keys)."""
    distance = torch.arange(keys, device=device)[None] - torch.arange(queries, device=device)[:, None]
    n = BUCKETS // 2 if both_ways else BUCKETS
    start = (distance > 0).long() * n if both_ways else torch.zeros_like(distance)
    distance = distance.abs() if both_ways else (-distance).clamp(min=0)
    exact = n // 2
    far = exact + (torch.log(distance.clamp(min=1) / exact) / math.log(FARTHEST / exact) * (n - exact)).long()
    return start + torch.where(distance < exact, distance, far.clamp(max=n - 1))


class Attention(nn.Module):
    """Attention of x to ``source`` (itself by default) with a bias per head. (B, T, D) -> (B, T, D)."""

    def __init__(self, d: int, h: int, dk: int) -> None:
        super().__init__()
        self.h = h
        self.q, self.k, self.v = (nn.Linear(d, h * dk, bias=False) for _ in range(3))
        self.o = nn.Linear(h * dk, d, bias=False)

    def forward(self, x: Tensor, source: Tensor, bias: Tensor | None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (
            w(y).view(B, y.shape[1], self.h, -1).transpose(1, 2)
            for w, y in ((self.q, x), (self.k, source), (self.v, source))
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        out: Tensor = self.o(y.transpose(1, 2).reshape(B, T, -1))
        return out


class Block(nn.Module):
    """Self-attention, in the decoder attention to the encoder, and a ReLU network, each after a norm."""

    def __init__(self, d: int, h: int, dk: int, f: int, decoder: bool) -> None:
        super().__init__()
        self.norm1, self.attention = RMSNorm(d, 1e-6), Attention(d, h, dk)
        self.norm2 = RMSNorm(d, 1e-6) if decoder else None
        self.cross = Attention(d, h, dk) if decoder else None
        self.norm3, self.up, self.down = RMSNorm(d, 1e-6), nn.Linear(d, f, bias=False), nn.Linear(f, d, bias=False)

    def forward(self, x: Tensor, bias: Tensor, encoded: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, bias)
        if self.cross is not None and self.norm2 is not None and encoded is not None:
            x = x + self.cross(self.norm2(x), encoded, None)
        out: Tensor = x + self.down(F.relu(self.up(self.norm3(x))))
        return out


class Stack(nn.Module):
    """L blocks, their position bias and a last norm."""

    def __init__(self, d: int, L: int, h: int, dk: int, f: int, decoder: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self.position = nn.Embedding(BUCKETS, h)
        self.layers = nn.ModuleList([Block(d, h, dk, f, decoder) for _ in range(L)])
        self.norm = RMSNorm(d, 1e-6)

    def forward(self, x: Tensor, encoded: Tensor | None = None) -> Tensor:
        T = x.shape[1]
        bias = self.position(buckets(T, T, not self.decoder, x.device)).permute(2, 0, 1)[None]
        if self.decoder:
            ahead = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            bias = bias.masked_fill(ahead, float("-inf"))
        for layer in self.layers:
            x = layer(x, bias, encoded)
        out: Tensor = self.norm(x)
        return out


class T5(nn.Module):
    """Source and target tokens (B, S), (B, T) -> logits (B, T, V)."""

    def __init__(self, V: int, d: int, L: int, h: int, dk: int, f: int) -> None:
        super().__init__()
        self.shared = nn.Embedding(V, d)
        self.encoder = Stack(d, L, h, dk, f, decoder=False)
        self.decoder = Stack(d, L, h, dk, f, decoder=True)
        self.scale = d**-0.5

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x = self.decoder(self.shared(target), self.encoder(self.shared(source)))
        return F.linear(x * self.scale, self.shared.weight)
