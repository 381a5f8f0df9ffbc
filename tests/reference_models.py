"""Models and training steps whose memory is compared, to the byte, with a real run.

The order of the operations matters here: what frees when decides the peak. Change nothing for style.

    B batch   S sequence   D model   H heads   V vocabulary
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class MLP(nn.Module):
    def __init__(self, width=512, hidden=2048, n_hidden=4, out=128):
        super().__init__()
        self.input = nn.Linear(width, hidden)
        self.hidden = nn.ModuleList([nn.Linear(hidden, hidden) for _ in range(n_hidden)])
        self.output = nn.Linear(hidden, out)

    def forward(self, x):
        x = F.relu(self.input(x))
        for layer in self.hidden:
            x = F.relu(layer(x))
        return self.output(x)


class ConvNet(nn.Module):
    def __init__(self, channels=64, n_classes=10):
        super().__init__()

        def stage(c_in, c_out, stride):
            conv = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))

        self.features = nn.Sequential(
            stage(3, channels, 1),
            stage(channels, channels, 1),
            stage(channels, 2 * channels, 2),
            stage(2 * channels, 2 * channels, 1),
            stage(2 * channels, 4 * channels, 2),
            nn.AdaptiveAvgPool2d(1),
        )
        self.head = nn.Linear(4 * channels, n_classes)

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


# ---- GPT-2


class GPTAttention(nn.Module):
    def __init__(self, width, n_heads, sdpa, dropout):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.sdpa = sdpa
        self.dropout = dropout
        self.attention_dropout, self.residual_dropout = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x):
        B, S, D = x.shape
        q, k, v = self.qkv(x).split(D, 2)
        q, k, v = (t.view(B, S, self.n_heads, D // self.n_heads).transpose(1, 2) for t in (q, k, v))
        if self.sdpa:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        else:
            scores = (q @ k.transpose(-2, -1)) * (1 / math.sqrt(q.size(-1)))
            mask = torch.ones(S, S, dtype=torch.bool, device=x.device).tril()
            scores = scores.masked_fill(~mask, float("-inf")).softmax(-1)
            y = self.attention_dropout(scores) @ v
        return self.residual_dropout(self.out(y.transpose(1, 2).contiguous().view(B, S, D)))


class GPTBlock(nn.Module):
    def __init__(self, width, n_heads, sdpa, dropout):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = GPTAttention(width, n_heads, sdpa, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    def __init__(
        self,
        vocab_size=50304,
        max_seq_len=1024,
        width=768,
        n_layers=12,
        n_heads=12,
        sdpa=True,
        dropout=0.0,
        recompute=False,
        tied=True,
    ):
        super().__init__()
        self.token = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(max_seq_len, width)
        self.blocks = nn.ModuleList([GPTBlock(width, n_heads, sdpa, dropout) for _ in range(n_layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        if tied:
            self.head.weight = self.token.weight
        self.recompute = recompute

    def forward(self, tokens, targets=None):
        S = tokens.shape[1]
        x = self.token(tokens) + self.position(torch.arange(S, device=tokens.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


# ---- Llama


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-5)


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class LlamaAttention(nn.Module):
    def __init__(self, width, n_heads, n_kv_heads):
        super().__init__()
        self.head_dim = width // n_heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(width, n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x, cos, sin):
        B, S, _ = x.shape
        q, k, v = (w(x).view(B, S, -1, self.head_dim).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(y.transpose(1, 2).reshape(B, S, -1))


class SwiGLU(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LlamaBlock(nn.Module):
    def __init__(self, width, n_heads, n_kv_heads, hidden):
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attention = LlamaAttention(width, n_heads, n_kv_heads)
        self.norm2 = RMSNorm(width)
        self.feed_forward = SwiGLU(width, hidden)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.feed_forward(self.norm2(x))


class Llama(nn.Module):
    def __init__(
        self,
        vocab_size=128256,
        width=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        hidden=14336,
        recompute=False,
    ):
        super().__init__()
        self.head_dim = width // n_heads
        self.embed = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList([LlamaBlock(width, n_heads, n_kv_heads, hidden) for _ in range(n_layers)])
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.recompute = recompute

    def forward(self, tokens, targets=None):
        x = self.embed(tokens)
        S = tokens.shape[1]
        angles = torch.outer(
            torch.arange(S, device=tokens.device),
            1 / (5e5 ** (torch.arange(0, self.head_dim, 2, device=tokens.device) / self.head_dim)),
        )
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for block in self.layers:
            x = checkpoint(block, x, cos, sin, use_reentrant=False) if self.recompute else block(x, cos, sin)
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ---- cases


@dataclass(frozen=True)
class Case:
    """One training step: a model, an optimizer, and how they are run."""

    model: str  # mlp, mlp_ckpt, conv, gpt, gpt_math, gpt_drop, llama
    optimizer: str = "adamw"
    dtype: str = "fp32"  # or bf16ac: autocast over fp32 parameters
    foreach: bool | None = None
    fused: bool = False
    recompute: bool = False
    accumulate: int = 1
    set_to_none: bool = True
    clip: bool = False


class Running(NamedTuple):
    """What a case became: `step()` does one optimizer step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: Tensor
    targets: Tensor
    step: Callable[[], None]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda parameters, **how: torch.optim.AdamW(parameters, lr=1e-3, **how),
    "sgd": lambda parameters, **how: torch.optim.SGD(parameters, lr=1e-3, **how),
    "sgdm": lambda parameters, **how: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, **how),
    "adagrad": lambda parameters, **how: torch.optim.Adagrad(parameters, lr=1e-3, **how),
}


def build(case: Case | str, device: str = "cpu") -> Running:
    """The case, or the one of that name in CASES, with its tensors on `device`."""
    if isinstance(case, str):
        case = CASES[case]
    model, x, y, loss_of = _model_and_loss(case, device)
    parameters = list(model.parameters())
    how: dict[str, Any] = {"fused": True} if case.fused else {"foreach": case.foreach}
    optimizer = OPTIMIZERS[case.optimizer](parameters, **how)
    autocast = case.dtype == "bf16ac"

    def step() -> None:
        for _ in range(case.accumulate):
            with torch.autocast(torch.device(device).type, torch.bfloat16) if autocast else contextlib.nullcontext():
                loss = loss_of()
            (loss / case.accumulate if case.accumulate > 1 else loss).backward()
            del loss
        if case.clip:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=case.set_to_none)

    return Running(model, optimizer, x, y, step)


def _model_and_loss(case: Case, device: str) -> tuple[nn.Module, Tensor, Tensor, Callable[[], Tensor]]:
    if case.model == "mlp":
        mlp = MLP()
        x, y = torch.randn(256, 512, device=device), torch.randn(256, 128, device=device)
        return mlp, x, y, lambda: F.mse_loss(mlp(x).float(), y)

    if case.model == "mlp_ckpt":
        mlp = MLP()
        x, y = torch.randn(256, 512, device=device), torch.randn(256, 128, device=device)

        def mlp_recomputed() -> Tensor:
            h = F.relu(mlp.input(x))
            for layer in mlp.hidden:
                h = checkpoint(lambda z, layer=layer: F.relu(layer(z)), h, use_reentrant=False)
            return F.mse_loss(mlp.output(h).float(), y)

        return mlp, x, y, mlp_recomputed

    if case.model == "conv":
        conv = ConvNet()
        x, y = torch.randn(16, 3, 32, 32, device=device), torch.randint(0, 10, (16,), device=device)
        return conv, x, y, lambda: F.cross_entropy(conv(x), y)

    if case.model.startswith("gpt"):
        sdpa = "math" not in case.model
        dropout = 0.1 if "drop" in case.model else 0.0
        model: nn.Module = GPT(1024, 256, 256, 4, 4, sdpa=sdpa, dropout=dropout, recompute=case.recompute)
    elif case.model == "llama":
        model = Llama(1024, 256, 4, 4, n_kv_heads=2, hidden=688, recompute=case.recompute)
    else:
        raise ValueError(f"no reference model {case.model!r}")
    x, y = (torch.randint(0, 1024, (4, 256), device=device) for _ in range(2))
    return model, x, y, lambda: model(x, y)


CASES: dict[str, Case] = {
    **{
        f"{model}/adamw/{dtype}": Case(model, "adamw", dtype)
        for model in ("mlp", "gpt", "gpt_math", "gpt_drop", "llama", "conv")
        for dtype in ("fp32", "bf16ac")
    },
    **{f"{model}/{name}/fp32": Case(model, name) for name in ("sgd", "sgdm", "adagrad") for model in ("mlp", "gpt")},
    **{f"mlp/{name}/foreach": Case("mlp", name, foreach=True) for name in ("adamw", "sgdm", "adagrad")},
    "mlp/adamw/fused": Case("mlp", fused=True),
    "gpt/adamw/ckpt": Case("gpt", recompute=True),
    "gpt/adamw/ckpt/bf16ac": Case("gpt", recompute=True, dtype="bf16ac"),
    "mlp_ckpt/adamw": Case("mlp_ckpt"),
    "gpt/adamw/accum2": Case("gpt", accumulate=2),
    "mlp/adamw/zero_grad_keep": Case("mlp", set_to_none=False),
    "mlp/adamw/clip": Case("mlp", clip=True),
}
