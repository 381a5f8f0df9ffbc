"""GPT-2 and GPT-3: learned positions, LayerNorm before each part, biases, GELU, one table for embedding and head.

    B batch   S sequence   D model   H heads   V vocabulary

Source: Radford et al. 2019, section 2.3; Brown et al. 2020, section 2.1. Submodules carry the names of OpenAI's
checkpoints (`wte`, `h.0.attn.c_attn`, ...). No dropout: GPT-3 has none, and at 0.0 it is no op.
"""

# ruff: noqa: D102 (what a forward takes and gives stands in its class docstring)

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bursar.architecture import Transformer


class Attention(nn.Module):
    """Causal multi-head attention with one matrix for queries, keys and values. (B, S, D) -> (B, S, D)."""

    def __init__(self, shape: Transformer) -> None:
        super().__init__()
        self.n_heads = shape.n_heads
        self.c_attn = nn.Linear(shape.d_model, 3 * shape.d_model, bias=shape.bias)
        self.c_proj = nn.Linear(shape.d_model, shape.d_model, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        B, S, D = x.shape
        q, k, v = self.c_attn(x).split(D, 2)
        q, k, v = (t.view(B, S, self.n_heads, D // self.n_heads).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.c_proj(y.transpose(1, 2).contiguous().view(B, S, D))
        return out


class MLP(nn.Module):
    """Two matrices with a GELU between, in GPT-2's tanh form."""

    def __init__(self, shape: Transformer) -> None:
        super().__init__()
        self.c_fc = nn.Linear(shape.d_model, shape.d_ff, bias=shape.bias)
        self.c_proj = nn.Linear(shape.d_ff, shape.d_model, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return out


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: Transformer) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.d_model, eps=shape.norm_eps)
        self.attn = Attention(shape)
        self.ln_2 = nn.LayerNorm(shape.d_model, eps=shape.norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class GPT(nn.Module):
    """A GPT language model. Tokens (B, S) -> logits (B, S, V), or with targets (B, S) the mean cross-entropy."""

    def __init__(self, shape: Transformer) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocab_size, shape.d_model)
        self.wpe = nn.Embedding(shape.max_seq_len, shape.d_model)
        self.h = nn.ModuleList([Block(shape) for _ in range(shape.n_layers)])
        self.ln_f = nn.LayerNorm(shape.d_model, eps=shape.norm_eps)
        self.lm_head = nn.Linear(shape.d_model, shape.vocab_size, bias=False)
        if shape.tied_embeddings:
            self.lm_head.weight = self.wte.weight
        self._initialise(shape.n_layers)

    def _initialise(self, n_layers: int) -> None:
        """N(0, 0.02), biases 0; what writes to the residual stream over √(2L). Source: Radford et al. 2019, 2.3."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layers))
            elif parameter.dim() == 2:  # not a LayerNorm's scale, which stays 1
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        logits: Tensor = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
