"""Mixtures of experts: Mixtral 8x7B and DeepSeek-V3, on Llama's block.

    B batch   S sequence   D model   F expert width   E experts   k of them per token   h heads

Source: Jiang et al. 2024 (arXiv:2401.04088), section 2; DeepSeek-AI 2024 (arXiv:2412.19437), sections 2.1 and 4.2.
Tokens are sorted by expert and multiplied in one grouped product, which is dropless: no capacity, nothing thrown away.
Load balancing (an auxiliary loss, or V3's bias that is moved outside the gradient) and V3's multi-token prediction are
not here.
"""

# ruff: noqa: D102 (what a forward takes and gives stands in its class docstring)

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bursar.architecture import Transformer
from bursar.workload.modules.llama import Llama, RMSNorm, SwiGLU, rotate


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows ``ends[e-1]:ends[e]`` of x by ``weight[e]``. (rows, m), (E, m, n) -> (rows, n)."""
    if x.device.type == "meta":  # torch's shape rule insists on bf16 there; any product has the shape and the gradients
        return x @ weight.sum(0)
    return F.grouped_mm(x, weight, offs=ends)


class Mixture(nn.Module):
    """k of E gated experts per token, their outputs weighted by the router. (B, S, D) -> (B, S, D).

    Mixtral takes the softmax over the chosen; V3 sigmoids, made to sum to 1, times a scale.
    """

    def __init__(self, d_model: int, d_expert: int, n_experts: int, per_token: int, scale: float | None = None) -> None:
        super().__init__()
        self.per_token, self.scale = per_token, scale
        self.router = nn.Linear(d_model, n_experts, bias=False)
        self.experts_in = nn.Parameter(torch.empty(n_experts, d_model, 2 * d_expert))  # gate and up side by side
        self.experts_out = nn.Parameter(torch.empty(n_experts, d_expert, d_model))
        nn.init.normal_(self.experts_in, std=0.02)
        nn.init.normal_(self.experts_out, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        scores = self.router(tokens).float()
        if self.scale is None:
            weights, chosen = scores.topk(self.per_token, -1)
            weights = weights.softmax(-1)
        else:
            weights, chosen = scores.sigmoid().topk(self.per_token, -1)
            weights = self.scale * weights / weights.sum(-1, keepdim=True)
        expert, order = chosen.flatten().sort()
        edges = torch.arange(1, self.experts_in.shape[0] + 1, device=x.device)
        ends = torch.searchsorted(expert, edges).int()  # of each expert's rows
        rows = tokens[order // self.per_token]
        gate, up = grouped(rows, self.experts_in, ends).chunk(2, -1)
        y = grouped(F.silu(gate) * up, self.experts_out, ends) * weights.flatten()[order, None].to(x.dtype)
        out = torch.zeros_like(tokens).index_add(0, order // self.per_token, y)
        return out.view_as(x)


class MixtureWithShared(nn.Module):
    """A mixture beside one expert that every token passes through."""

    def __init__(self, shape: Transformer, routed: Mixture) -> None:
        super().__init__()
        self.routed = routed
        self.shared = SwiGLU(shape)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.routed(x) + self.shared(x)
        return out


class LatentAttention(nn.Module):
    """Causal attention whose keys and values come from one narrow latent (MLA). (B, S, D) -> (B, S, D).

    A head's queries and keys are ``nope`` channels without position and ``rope`` with, the latter shared by all heads.
    """

    def __init__(self, d_model: int, h: int, q_rank: int, kv_rank: int, nope: int, rope: int, v: int) -> None:
        super().__init__()
        self.h, self.nope, self.rope, self.v, self.kv_rank = h, nope, rope, v, kv_rank
        self.q_down = nn.Linear(d_model, q_rank, bias=False)
        self.q_norm = RMSNorm(q_rank, 1e-6)
        self.q_up = nn.Linear(q_rank, h * (nope + rope), bias=False)
        self.kv_down = nn.Linear(d_model, kv_rank + rope, bias=False)
        self.kv_norm = RMSNorm(kv_rank, 1e-6)
        self.kv_up = nn.Linear(kv_rank, h * (nope + v), bias=False)
        self.wo = nn.Linear(h * v, d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, S, _ = x.shape
        q = self.q_up(self.q_norm(self.q_down(x))).view(B, S, self.h, -1).transpose(1, 2)
        q, q_turned = q.split((self.nope, self.rope), -1)
        latent, k_turned = self.kv_down(x).split((self.kv_rank, self.rope), -1)
        k, v = self.kv_up(self.kv_norm(latent)).view(B, S, self.h, -1).transpose(1, 2).split((self.nope, self.v), -1)
        k_turned = rotate(k_turned[:, None], cos, sin).expand(-1, self.h, -1, -1)
        q, k = torch.cat((q, rotate(q_turned, cos, sin)), -1), torch.cat((k, k_turned), -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.wo(y.transpose(1, 2).reshape(B, S, -1))
        return out


def mixtral(shape: Transformer, n_experts: int, per_token: int) -> Llama:
    """Llama with a mixture of ``shape.d_ff`` wide experts in every layer."""
    return Llama(shape, feed_forward=lambda _: Mixture(shape.d_model, shape.d_ff, n_experts, per_token))


def deepseek_v3(shape: Transformer, expert: Transformer, s: dict[str, int]) -> Llama:
    """DeepSeek-V3: latent attention; ``s["dense"]`` layers of SwiGLU first, then mixtures with a shared expert.

    ``shape`` has the dense width, ``expert`` an expert's; ``s`` the sizes of the catalogue's row.
    """

    def feed_forward(layer: int) -> nn.Module:
        if layer < s["dense"]:
            return SwiGLU(shape)
        return MixtureWithShared(expert, Mixture(shape.d_model, expert.d_ff, s["E"], s["k"], scale=2.5))

    def attention(_: int) -> nn.Module:
        return LatentAttention(shape.d_model, shape.n_heads, s["q"], s["kv"], s["nope"], s["rope"], s["v"])

    return Llama(shape, feed_forward=feed_forward, attention=attention, rotated=s["rope"])
