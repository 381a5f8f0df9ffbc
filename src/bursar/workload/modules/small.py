"""The notes' two networks and a plain MLP: small enough to check every figure by hand.

B batch   D width in   H hidden   K width out   L layers
"""

# ruff: noqa: D102 (what a forward takes and gives stands in its class docstring)

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TwoLayer(nn.Module):
    """x (B, D) -> w1 (D, D) -> w2 (D, K), no bias, nothing between. Source: CS336 lecture 2, gradients_flops."""

    def __init__(self, D: int, K: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(D, D, bias=False)
        self.w2 = nn.Linear(D, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h2: Tensor = self.w2(self.w1(x))
        return h2


class Linear(nn.Module):
    """x @ weight, the weight (in, out) and its entries N(0, 1/in), so that the output keeps the input's variance."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) / math.sqrt(n_in))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Cruncher(nn.Module):
    """L square layers and a head of width 1. (B, D) -> (B,). Source: CS336 lecture 2, Cruncher."""

    def __init__(self, D: int = 4, L: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Linear(D, D) for _ in range(L)])
        self.final = Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.final(x).squeeze(-1)
        return out


class MLP(nn.Module):
    """D -> H, then L layers H -> H, then H -> K; ReLU after each but the last. (B, D) -> (B, K)."""

    def __init__(self, D: int, H: int, L: int, K: int) -> None:
        super().__init__()
        self.input = nn.Linear(D, H)
        self.hidden = nn.ModuleList([nn.Linear(H, H) for _ in range(L)])
        self.output = nn.Linear(H, K)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.input(x))
        for layer in self.hidden:
            x = F.relu(layer(x))
        out: Tensor = self.output(x)
        return out
