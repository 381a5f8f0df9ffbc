"""BERT with its masked-language-model head.

    B batch   S sequence   D model   V vocabulary

Source: Devlin et al. 2018 (arXiv:1810.04805), sections 3 and 3.1, and Google's own code: norms after each part, GELU,
segment and position tables, a head that shares the token table. No dropout, so that a step is the same each time.
"""

# ruff: noqa: D102 (what a forward takes and gives stands in its class docstring)

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bursar.architecture import Transformer


class Block(nn.Module):
    """One layer: norm(x + attention(x)), then norm(x + mlp(x)). (B, S, D) -> (B, S, D)."""

    def __init__(self, shape: Transformer) -> None:
        super().__init__()
        d = shape.d_model
        self.n_heads = shape.n_heads
        self.query, self.key, self.value, self.output = (nn.Linear(d, d) for _ in range(4))
        self.attention_norm = nn.LayerNorm(d, eps=shape.norm_eps)
        self.up, self.down = nn.Linear(d, shape.d_ff), nn.Linear(shape.d_ff, d)
        self.norm = nn.LayerNorm(d, eps=shape.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        B, S, D = x.shape
        q, k, v = (w(x).view(B, S, self.n_heads, -1).transpose(1, 2) for w in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, S, D)
        x = self.attention_norm(x + self.output(y))
        out: Tensor = self.norm(x + self.down(F.gelu(self.up(x))))
        return out


class BERT(nn.Module):
    """Tokens (B, S) -> logits (B, S, V), or with targets (B, S) the mean cross-entropy over all positions."""

    def __init__(self, shape: Transformer) -> None:
        super().__init__()
        d = shape.d_model
        self.word = nn.Embedding(shape.vocab_size, d)
        self.position = nn.Embedding(shape.max_seq_len, d)
        self.segment = nn.Embedding(shape.n_token_types, d)
        self.norm = nn.LayerNorm(d, eps=shape.norm_eps)
        self.layers = nn.ModuleList([Block(shape) for _ in range(shape.n_layers)])
        self.transform = nn.Linear(d, d)
        self.transform_norm = nn.LayerNorm(d, eps=shape.norm_eps)
        self.decoder = nn.Linear(d, shape.vocab_size)
        if shape.tied_embeddings:
            self.decoder.weight = self.word.weight
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.word(tokens) + self.segment(torch.zeros_like(tokens)) + self.position(positions))
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.decoder(self.transform_norm(F.gelu(self.transform(x))))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
