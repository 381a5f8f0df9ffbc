"""Llama 2, Llama 3 and CS336's language model: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    B batch   S sequence   D model   V vocabulary

Source: Touvron et al. 2023 (arXiv:2307.09288), section 2.2; Grattafiori et al. 2024 (arXiv:2407.21783), section 3.2.
Submodules carry Meta's names (`layers.0.attention.wq`, `feed_forward.w1`, ...).
"""

# ruff: noqa: D102 (what a forward takes and gives stands in its class docstring)

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bursar.architecture import Transformer
from bursar.errors import BadInput


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + head_dim/2) of x by their angles. Source: Su et al. 2021 (arXiv:2104.09864), 3.4.2."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class RMSNorm(nn.Module):
    """x / root-mean-square(x), times a learned scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Causal attention, `n_heads / n_kv_heads` queries to a key-value head. (B, S, D) -> (B, S, D)."""

    def __init__(self, shape: Transformer) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.grouped = shape.n_kv_heads < shape.n_heads
        q_width, kv_width = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
        self.wq = nn.Linear(shape.d_model, q_width, bias=shape.bias)
        self.wk = nn.Linear(shape.d_model, kv_width, bias=shape.bias)
        self.wv = nn.Linear(shape.d_model, kv_width, bias=shape.bias)
        self.wo = nn.Linear(q_width, shape.d_model, bias=shape.bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, S, _ = x.shape
        q, k, v = (w(x).view(B, S, -1, self.head_dim).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        out: Tensor = self.wo(y.transpose(1, 2).reshape(B, S, -1))
        return out


class SwiGLU(nn.Module):
    """Gated feed-forward, three matrices: w2(silu(w1 x) * w3 x). Source: Shazeer 2020 (arXiv:2002.05202)."""

    def __init__(self, shape: Transformer) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.d_model, shape.d_ff, bias=shape.bias)
        self.w3 = nn.Linear(shape.d_model, shape.d_ff, bias=shape.bias)
        self.w2 = nn.Linear(shape.d_ff, shape.d_model, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class TwoMatrices(nn.Module):
    """Ungated feed-forward: w2(silu(w1 x))."""

    def __init__(self, shape: Transformer) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.d_model, shape.d_ff, bias=shape.bias)
        self.w2 = nn.Linear(shape.d_ff, shape.d_model, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)))
        return out


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, shape: Transformer, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.d_model, shape.norm_eps)
        self.attention = attention
        self.ffn_norm = RMSNorm(shape.d_model, shape.norm_eps)
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        out: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return out


class Llama(nn.Module):
    """A Llama language model. Tokens (B, S) -> logits (B, S, V), or with targets (B, S) the mean cross-entropy.

    ``feed_forward`` and ``attention``, given a layer's number, make another than Llama's own; ``rotated`` is then how
    many channels of a head are turned.
    """

    def __init__(
        self,
        shape: Transformer,
        feed_forward: Callable[[int], nn.Module] | None = None,
        attention: Callable[[int], nn.Module] | None = None,
        rotated: int | None = None,
    ) -> None:
        super().__init__()
        if shape.rope_theta is None:
            raise BadInput(f"{shape.name}: a Llama turns its queries and keys by position; give rope_theta")
        self.head_dim = rotated or shape.head_dim
        self.rope_theta = shape.rope_theta
        attention = attention or (lambda _: Attention(shape))
        feed_forward = feed_forward or (lambda _: SwiGLU(shape) if shape.gated_mlp else TwoMatrices(shape))
        self.embed = nn.Embedding(shape.vocab_size, shape.d_model)
        self.layers = nn.ModuleList([Block(shape, attention(i), feed_forward(i)) for i in range(shape.n_layers)])
        self.norm = RMSNorm(shape.d_model, shape.norm_eps)
        self.head = nn.Linear(shape.d_model, shape.vocab_size, bias=False)
        if shape.tied_embeddings:
            self.head.weight = self.embed.weight
        self._initialise()

    def _initialise(self) -> None:
        """Matrices N(0, 0.02), biases 0, scales 1. Source: `initializer_range` of Llama's config.json."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        # The angles of every position, (S, head_dim/2), once for all layers. They stay in scope to the end, one table
        # more of live memory: so were the runs written that bursar's figures are compared with.
        angles = torch.outer(
            torch.arange(tokens.shape[1], device=tokens.device),
            1 / (self.rope_theta ** (torch.arange(0, self.head_dim, 2, device=tokens.device) / self.head_dim)),
        )
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.layers:
            x = block(x, cos, sin)
        logits: Tensor = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
