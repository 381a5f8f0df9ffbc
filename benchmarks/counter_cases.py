"""Models whose FLOPs are known by hand: each case says how to build it and what it costs, and nothing else.

    B batch   S sequence   T tokens   D model   F hidden   H heads   V vocabulary

A multiply and an add are two FLOPs; (m, k) @ (k, n) is 2mkn; biases, norms and activations are not in it, and sizes are
such that they are less than 10 % of it. Backward is a product per gradient asked for: 2 x forward, less the gradient of
the input where the first layer's input wants none. A causal mask lets S(S+1)/2 pairs through; the full square and a
fused kernel's recompute are other conventions, and are named, not called wrong.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Built = tuple[nn.Module, tuple[Any, ...]]
CPU_CASE = "attention on the CPU"  # counted as the CPU runs it, by whoever tells devices apart


@dataclass(frozen=True)
class Case:
    """One model, its batch and its FLOPs, derived by hand."""

    name: str
    build: Callable[[], Built]  # on torch's default device
    forward: dict[str, int] = field(default_factory=dict)  # by convention; "" is bursar's
    step: dict[str, int] = field(default_factory=dict)  # forward and backward; empty: not asked
    culprits: tuple[str, ...] = ()  # words that name what a tool leaves out: the op, or the module that calls it
    why: str = ""  # the derivation
    products: bool = True  # matrix products, attention, convolutions; else the other work: total
    samples: int = 1  # of the modules' batch, for tools that report per sample


# ---- the modules


class Plain(nn.Module):
    """A function of its input as a module; one unused parameter, since some counters look for one."""

    def __init__(self, f: Callable[..., Tensor]) -> None:
        super().__init__()
        self.f, self.unused = f, nn.Parameter(torch.zeros(1))

    def forward(self, *args: Tensor) -> Tensor:  # noqa: D102
        return self.f(*args)


class Weighted(nn.Module):
    """A function of its input and weights of given shapes as a module."""

    def __init__(self, f: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.f, self.weights = f, nn.ParameterList([nn.Parameter(torch.randn(s)) for s in shapes])

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.f(x, *self.weights)


class LlamaBlock(nn.Module):
    """RMSNorm, attention with fewer heads for keys and values than for queries, SwiGLU."""

    def __init__(self, D: int, H: int, n_kv: int, F_: int) -> None:
        super().__init__()
        self.h, self.dim = H, D // H
        self.n1, self.n2 = nn.RMSNorm(D), nn.RMSNorm(D)
        self.q, self.o = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.k, self.v = (nn.Linear(D, n_kv * self.dim, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(D, F_, bias=False) for _ in range(2))
        self.down = nn.Linear(F_, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = self.n1(x)
        q, k, v = (m(y).unflatten(-1, (-1, self.dim)).transpose(1, 2) for m in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        y = self.n2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class LoRA(nn.Module):
    """A frozen square matrix and two thin ones beside it that learn."""

    def __init__(self, D: int, r: int) -> None:
        super().__init__()
        self.base = nn.Linear(D, D, bias=False).requires_grad_(False)
        self.a, self.b = nn.Linear(D, r, bias=False), nn.Linear(r, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.base(x) + self.b(self.a(x))


class Checkpointed(nn.Module):
    """Linear and ReLU, twice, each under torch's checkpoint."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(D, D), nn.ReLU()) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class LogitsOnly(nn.Module):
    """A model of transformers that takes tokens and returns a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return out


@torch.library.custom_op("counters::product", mutates_args=())
def product(a: Tensor, b: Tensor) -> Tensor:
    """A matrix product that nobody's table of rules knows."""
    return a @ b


@product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def loop(x: Tensor, w: Tensor) -> Tensor:
    """torch's while_loop, five times x @ w."""
    from torch._higher_order_ops import while_loop

    start = (torch.zeros((), dtype=torch.int64), x)
    out: Tensor = while_loop(lambda i, x: i < 5, lambda i, x: (i + 1, x @ w), start)[1]
    return out


# ---- how each is built


def mlp() -> Built:
    widths = (256, 512, 512, 128)
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), (torch.randn(32, 256),)


def resnet50() -> Built:
    from bursar.workload.modules.resnet import ResNet50

    return ResNet50(), (torch.randn(1, 3, 224, 224),)


def mobilenet() -> Built:
    from bursar.workload.modules.mobilenet import MobileNetV2

    return MobileNetV2(), (torch.randn(1, 3, 224, 224),)


def convs(layer: type[nn.Module], *sizes: tuple[int, int], R: int, **how: int) -> Built:
    return nn.Sequential(*[layer(a, b, **how) for a, b in sizes]), (torch.randn(1, sizes[0][0], R, R),)


def gpt2() -> Built:
    from bursar.architecture import preset
    from bursar.workload.modules.gpt import GPT

    return GPT(preset("gpt2")), (torch.randint(50257, (1, 256)),)


def mixtral(experts: str) -> Built:
    from transformers import MixtralConfig, MixtralForCausalLM

    with torch.device("cpu"):
        config = MixtralConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                               num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
                               num_experts_per_tok=2, vocab_size=256)  # fmt: skip
    config._experts_implementation = experts
    return LogitsOnly(MixtralForCausalLM(config)).bfloat16(), (torch.randint(256, (1, 64)),)


def of(module: Callable[[], nn.Module], *shape: int) -> Built:
    return module(), (torch.randn(shape),)


def bag() -> Built:
    return nn.EmbeddingBag(1000, 64, mode="sum"), (torch.randint(1000, (1, 32)),)


# ---- what each costs


def conv(out: int, c_in: int, kernel: int, side: int, groups: int = 1) -> int:
    """2 per output element, input channel of its group and tap."""
    return 2 * out * side * side * c_in // groups * kernel * kernel


def resnet50_flops() -> int:
    """He et al. 2015, table 1, stride in the 3x3 (v1.5): (blocks, width, side) by stage, channels in before."""
    total, c = conv(64, 3, 7, 112), 64
    for stage, (blocks, w, side) in enumerate(((3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7))):
        before = side if stage == 0 else 2 * side
        for block in range(blocks):
            first = before if block == 0 else side
            total += conv(w, c, 1, first) + conv(w, w, 3, side) + conv(4 * w, w, 1, side)
            total += conv(4 * w, c, 1, side) if block == 0 else 0
            c = 4 * w
    return total + 2 * 2048 * 1000


def mobilenet_flops() -> int:
    """Sandler et al. 2018, table 2: expansion, channels, blocks, stride."""
    total, c, side = conv(32, 3, 3, 112), 32, 112
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for t, out, blocks, stride in table:
        for block in range(blocks):
            wide, before = c * t, side
            side = side // stride if block == 0 else side
            total += conv(wide, c, 1, before) if t > 1 else 0
            total += conv(wide, wide, 3, side, groups=wide) + conv(out, wide, 1, side)
            c = out
    return total + conv(1280, 320, 1, 7) + 2 * 1280 * 1000


def decoder(tokens: int, weights: int, layers: int, heads: int, d_head: int) -> tuple[dict[str, int], dict[str, int]]:
    """A causal decoder of one sequence whose matrices hold ``weights``: forward, and with backward."""
    pairs, square = tokens * (tokens + 1) // 2, tokens * tokens
    matrices, per_pair = 2 * tokens * weights, 4 * layers * heads * d_head
    return (
        {"": matrices + pairs * per_pair, "full square": matrices + square * per_pair},
        {
            "": 3 * (matrices + pairs * per_pair),
            "full square": 3 * (matrices + square * per_pair),
            "full square, recompute": 3 * matrices + 7 * square * per_pair // 2,
        },
    )


def cases() -> tuple[Case, ...]:
    """All of them, in the order of the table."""
    out: list[Case] = []

    def add(name: str, build: Callable[[], Built], forward: Any, step: Any = None, *culprits: str, **rest: Any) -> None:
        f, s = ({"": v} if isinstance(v, int) else v or {} for v in (forward, step))
        out.append(Case(name, build, f, s, culprits, **rest))

    n = 2 * 32 * (256 * 512 + 512 * 512 + 512 * 128)
    add("MLP", mlp, n, 3 * n - 2 * 32 * 256 * 512, why="2·B·Σ in·out; no dX of the first layer", samples=32)

    n = resnet50_flops()
    add("ResNet-50", resnet50, n, 3 * n - conv(64, 3, 7, 112), why="2·C_out·H·W·C_in·k² by table 1 of the paper")

    n = mobilenet_flops()
    add(
        "MobileNetV2",
        mobilenet,
        n,
        3 * n - conv(32, 3, 3, 112),
        why="2·C_out·H·W·(C_in/groups)·k² by table 2 of the paper",
    )

    a, b = conv(64, 32, 3, 16, 4), conv(128, 64, 3, 16, 4)
    add("grouped convolution", partial(convs, nn.Conv2d, (32, 64), (64, 128), R=16, kernel_size=3, padding=1, groups=4),
        a + b, 3 * (a + b) - a, why="C_in/groups inputs per output")  # fmt: skip

    a, b = 2 * 64 * 16 * 16 * 32 * 16, 2 * 32 * 32 * 32 * 16 * 16  # 2 · C_in · H_in · W_in · C_out · k²
    add("transposed convolution",
        partial(convs, nn.ConvTranspose2d, (64, 32), (32, 16), R=16, kernel_size=4, stride=2, padding=1),
        a + b, 3 * (a + b) - a, why="each input element meets C_out·k² weights")  # fmt: skip

    sdpa = "scaled_dot_product"
    add("GPT-2 small, causal", gpt2, *decoder(256, 12 * 12 * 768**2 + 50257 * 768, 12, 12, 64), sdpa, "gpt.Attention",
        "module Attention", why="2·S·(12·L·D² + V·D) + 4·L·D·S(S+1)/2")  # fmt: skip

    D, kv, F_, S = 256, 64, 688, 128
    add("Llama block, GQA", lambda: (LlamaBlock(D, 8, 2, F_).bfloat16(), (torch.randn(1, S, D).bfloat16(),)),
        *decoder(S, 2 * D * D + 2 * D * kv + 3 * D * F_, 1, 8, 32), sdpa, "LlamaBlock",
        why="8 heads of queries on 2 of keys: the pairs are those of 8")  # fmt: skip

    n = 4 * 8 * 128 * 128 * 64
    qkv = lambda x: F.scaled_dot_product_attention(*x.split(64, -1))  # noqa: E731
    add(CPU_CASE, lambda: of(lambda: Plain(qkv), 1, 8, 128, 192), n, None, sdpa, "Plain", why="4·B·H·S²·d, no mask")

    n = 4 * 10 * 2 * 256 * (32 + 64)
    add("LSTM", lambda: of(lambda: First(nn.LSTM(32, 64, batch_first=True)), 4, 10, 32), n,
        2 * n + 4 * 9 * 2 * 256 * 64, "lstm", "rnn", samples=4,
        why="2·B·T·4H·(I + H); no gradient into the input and the first state")  # fmt: skip

    a, b = 2 * 64 * 32 * 128, 2 * 64 * 128 * 16
    add("einsum ij,jk,kl->il", lambda: of(lambda: Weighted(chain, (32, 128), (128, 16)), 64, 32), a + b,
        3 * (a + b) - a, "einsum", "Weighted", why="left to right: 2ijk + 2ikl")  # fmt: skip

    n = 2 * 8 * 32 * 64 * 48
    add("bmm", lambda: of(lambda: Weighted(lambda x, w: torch.bmm(x[0], w), (8, 64, 48)), 1, 8, 32, 64), n, 2 * n,
        "bmm", "Weighted", why="2·b·m·k·n; the input wants no gradient")  # fmt: skip

    n = 64 * 2 * (64 * 192 + 64 * 64 + 2 * 64 * 128) + 4 * 2 * 32 * 32 * 64
    encoder = lambda: nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()  # noqa: E731
    add("TransformerEncoderLayer, eval", lambda: of(encoder, 2, 32, 64), n, None, "encoder", "multi_head",
        "MultiheadAttention", samples=2, why="2·T·(4·E² + 2·E·I) + 4·B·S²·E; one kernel under no_grad")  # fmt: skip

    per_layer = 64 * (64 + 32 + 32 + 64) + 64 * 4 + 2 * 3 * 64 * 128
    for how in ("eager", "grouped_mm"):
        add(f"Mixtral's shape, {how}", partial(mixtral, how), *decoder(64, 2 * per_layer + 64 * 256, 2, 4, 16),
            "grouped", "expert", "linear_", sdpa, why="a token meets 2 of 4 experts and the router")  # fmt: skip

    D, r, T = 256, 8, 64
    base, thin = 2 * T * D * D, 2 * T * D * r
    add("LoRA", lambda: of(lambda: nn.Sequential(LoRA(D, r), LoRA(D, r)), 1, T, D), 2 * base + 4 * thin,
        2 * base + 4 * thin + base + 3 * thin + 4 * thin,
        why="frozen matrices get no dW; the first layer's input no dX")  # fmt: skip

    D, B = 256, 32
    n = 2 * 2 * B * D * D
    add("checkpointed MLP", lambda: of(lambda: Checkpointed(D), B, D), n,
        {"": 3 * n - n // 2, "with recompute": 4 * n - n // 2}, why="model FLOPs; the hardware's have forward twice",
        samples=32)  # fmt: skip

    add("custom op", lambda: of(lambda: Weighted(product, (32, 8)), 16, 32), 2 * 16 * 32 * 8, None, "product",
        "Weighted", why="2mkn behind torch.library.custom_op, no rule given")  # fmt: skip
    add("while_loop", lambda: of(lambda: Weighted(loop, (32, 32)), 4, 32), 5 * 2 * 4 * 32 * 32, None, "while_loop",
        "Weighted", why="five times 2mkn")  # fmt: skip

    # work of other kinds: a tool that counts products only is not asked
    add("embedding bag", bag, {"": 32 * 64, "first row free": 31 * 64}, None, "embedding_bag", "EmbeddingBag",
        why="adds up 32 rows of 64", products=False)  # fmt: skip
    add("FFT", lambda: (Plain(torch.fft.fft), (torch.randn(1, 16, 1024, dtype=torch.complex64),)),
        5 * 16 * 1024 * int(math.log2(1024)), None, "fft", products=False,
        why="5·N·log₂ N, FFTW's convention")  # fmt: skip
    add("elementwise only", lambda: (Plain(lambda x: F.relu(x * 2 + 1)), (torch.randn(1, 64, 1024),)),
        3 * 64 * 1024, None, "mul", "add", "relu", why="three ops, one per element", products=False)  # fmt: skip
    add("AdamW's update", mlp, {}, 14 * (256 * 512 + 512 * 512 + 512 * 128 + 512 + 512 + 128), "adam",
        why="per parameter: decay 1, first moment 3, second 4, root, correction, ε 3, update 3",
        products=False)  # fmt: skip
    return tuple(out)


class First(nn.Module):
    """A module's first output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out: Tensor = self.inner(x)[0]
        return out


def chain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """An einsum from left to right, whatever optimizer of paths is installed."""
    with torch.backends.opt_einsum.flags(enabled=False):
        return torch.einsum("ij,jk,kl->il", x, a, b)
