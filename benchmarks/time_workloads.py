"""The networks of `balance_time.py`: families that the calibration never saw, each a callable that bursar takes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Recurrent(nn.Module):
    """Token embedding, a recurrent stack, a head over the vocabulary."""

    def __init__(self, cell: type[nn.Module], vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.cells: Any = cell(width, width, layers, batch_first=True)  # type: ignore[call-arg]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss."""
        logits = self.head(self.cells(self.embed(ids))[0])
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten())


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, norm over channels, an inverted bottleneck, a scale per channel."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(d, d, 7, padding=3, groups=d), nn.LayerNorm(d)
        self.up, self.down, self.scale = nn.Linear(d, 4 * d), nn.Linear(4 * d, d), nn.Parameter(torch.ones(d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Three stages, halved in between."""

    def __init__(self, widths: tuple[int, ...] = (48, 96, 192), blocks: int = 2, classes: int = 100) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4)]
        for i, d in enumerate(widths):
            if i:
                layers += [nn.GroupNorm(1, widths[i - 1]), nn.Conv2d(widths[i - 1], d, 2, 2)]
            layers += [ConvNeXtBlock(d) for _ in range(blocks)]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(widths[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The loss."""
        return F.cross_entropy(self.head(self.body(x).mean((2, 3))), torch.arange(len(x)) % 10)


def _twice(a: int, b: int) -> nn.Module:
    def one(i: int) -> list[nn.Module]:
        return [nn.Conv2d(i, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU()]

    return nn.Sequential(*one(a), *one(b))


class UNet(nn.Module):
    """Two levels down, two up, the skips joined."""

    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = _twice(3, d), _twice(d, 2 * d), _twice(2 * d, 4 * d)
        self.rise2, self.rise1 = nn.ConvTranspose2d(4 * d, 2 * d, 2, 2), nn.ConvTranspose2d(2 * d, d, 2, 2)
        self.up2, self.up1, self.out = _twice(4 * d, 2 * d), _twice(2 * d, d), nn.Conv2d(d, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The loss."""
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.middle(F.max_pool2d(b, 2))
        c = self.up2(torch.cat([self.rise2(c), b], 1))
        return F.mse_loss(self.out(self.up1(torch.cat([self.rise1(c), a], 1))), x)


class Experts(nn.Module):
    """A mixture of experts, every expert over its fixed share of the tokens, between attention and residuals."""

    def __init__(self, d: int = 256, experts: int = 4, layers: int = 3, vocabulary: int = 2000) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, d), nn.Linear(d, vocabulary, bias=False)
        self.layers = nn.ModuleList(
            nn.ModuleDict({
                "norm": nn.LayerNorm(d), "qkv": nn.Linear(d, 3 * d), "out": nn.Linear(d, d),
                "router": nn.Linear(d, experts),
                "experts": nn.ModuleList(
                    nn.Sequential(nn.Linear(d, 2 * d), nn.SiLU(), nn.Linear(2 * d, d)) for _ in range(experts)
                ),
            })
            for _ in range(layers)
        )  # fmt: skip

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss."""
        x = self.embed(ids)
        b, s, d = x.shape
        for layer in self.layers:
            q, k, v = layer["qkv"](layer["norm"](x)).view(b, s, 3, 4, d // 4).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer["out"](y.transpose(1, 2).reshape(b, s, d))
            weights = layer["router"](x).softmax(-1)
            n = len(layer["experts"])
            shares = zip(layer["experts"], x.chunk(n, 1), weights.chunk(n, 1), strict=True)
            parts = [expert(tokens) * share[..., :1] for expert, tokens, share in shares]
            x = x + torch.cat(parts, 1)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def _ids(vocabulary: int, b: int, s: int) -> torch.Tensor:
    return torch.arange(b * s).mul_(7919).remainder_(vocabulary).view(b, s)


def _images(b: int, side: int) -> torch.Tensor:
    return torch.linspace(-1, 1, b * 3 * side * side).view(b, 3, side, side)


def lstm() -> Any:
    return Recurrent(nn.LSTM, 1000, 256, 2), _ids(1000, 16, 48)


def gru() -> Any:
    return Recurrent(nn.GRU, 500, 192, 1), _ids(500, 16, 40)


def convnext() -> Any:
    return ConvNeXt(), _images(8, 96)


def unet() -> Any:
    return UNet(), _images(2, 48)


def experts() -> Any:
    return Experts(), _ids(2000, 4, 128)
