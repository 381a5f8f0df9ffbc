"""Mamba: a selective state space instead of attention.

    B batch   S sequence   D model   I = 2D inner width   N state   R rank of the step   V vocabulary

Source: Gu and Dao 2023 (arXiv:2312.00752), section 3 and algorithm 2. The recurrence h_t = a_t h_(t-1) + b_t is run
here as a prefix scan of log2(S) whole-tensor passes, in torch: the published kernel fuses it, keeps no (B, S, I, N)
tensor and recomputes in backward, so FLOPs of the products agree and bytes are upper bounds.
"""

# ruff: noqa: D102 (what a forward takes and gives stands in its class docstring)

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bursar.workload.modules.llama import RMSNorm


def scan(a: Tensor, b: Tensor) -> Tensor:
    """h_t = a_t h_(t-1) + b_t along dimension 1, h_(-1) = 0, by doubling the reach of each pair."""
    reach = 1
    while reach < b.shape[1]:
        head, tail = b[:, :reach], b[:, reach:] + a[:, reach:] * b[:, :-reach]
        a = torch.cat((a[:, :reach], a[:, reach:] * a[:, :-reach]), 1)
        b = torch.cat((head, tail), 1)
        reach *= 2
    return b


class Mixer(nn.Module):
    """Convolution, selective scan and gate. (B, S, D) -> (B, S, D)."""

    def __init__(self, d: int, n: int, r: int, kernel: int) -> None:
        super().__init__()
        inner = 2 * d
        self.n, self.r = n, r
        self.in_proj = nn.Linear(d, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, kernel, groups=inner, padding=kernel - 1)
        self.x_proj = nn.Linear(inner, r + 2 * n, bias=False)
        self.dt_proj = nn.Linear(r, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, n + 1).repeat(inner, 1)))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        S = x.shape[1]
        u, gate = self.in_proj(x).chunk(2, -1)
        u = F.silu(self.conv(u.transpose(1, 2))[..., :S].transpose(1, 2))
        dt, b, c = self.x_proj(u).split((self.r, self.n, self.n), -1)
        dt = F.softplus(self.dt_proj(dt))
        a = torch.exp(dt[..., None] * -torch.exp(self.A_log))
        h = scan(a, (dt * u)[..., None] * b[:, :, None])
        y = (h @ c[..., None]).squeeze(-1) + u * self.D
        out: Tensor = self.out_proj(y * F.silu(gate))
        return out


class Mamba(nn.Module):
    """Tokens (B, S) -> logits (B, S, V), or with targets (B, S) the mean cross-entropy. The head is the token table."""

    def __init__(self, V: int, d: int, L: int, N: int, R: int, kernel: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, d)
        self.norms = nn.ModuleList([RMSNorm(d, 1e-5) for _ in range(L)])
        self.layers = nn.ModuleList([Mixer(d, N, R, kernel) for _ in range(L)])
        self.norm = RMSNorm(d, 1e-5)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        logits = F.linear(self.norm(x), self.embed.weight)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
