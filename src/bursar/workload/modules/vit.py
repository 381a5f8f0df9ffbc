"""Vision transformers: images cut into patches, a class token, norms before each part.

    B batch   N patches + 1   D model

Source: Dosovitskiy et al. 2020 (arXiv:2010.11929), section 3.1 and table 1; no dropout.
"""

# ruff: noqa: D102 (what a forward takes and gives stands in its class docstring)

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). (B, N, D) -> (B, N, D)."""

    def __init__(self, d: int, h: int, f: int) -> None:
        super().__init__()
        self.h = h
        self.norm1, self.norm2 = nn.LayerNorm(d, eps=1e-6), nn.LayerNorm(d, eps=1e-6)
        self.query, self.key, self.value, self.output = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, f), nn.Linear(f, d)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        y = self.norm1(x)
        q, k, v = (w(y).view(B, N, self.h, -1).transpose(1, 2) for w in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)
        x = x + self.output(y)
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class ViT(nn.Module):
    """Images (B, 3, R, R) -> logits (B, K), read off the class token. P is the side of a patch."""

    def __init__(self, d: int, L: int, h: int, F_: int, P: int, R: int, K: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, d, P, stride=P)
        self.class_token = nn.Parameter(torch.zeros(1, 1, d))
        self.position = nn.Parameter(torch.randn(1, (R // P) ** 2 + 1, d) * 0.02)
        self.layers = nn.ModuleList([Block(d, h, F_) for _ in range(L)])
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.head = nn.Linear(d, K)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), 1) + self.position
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits
