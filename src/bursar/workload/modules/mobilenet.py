"""MobileNetV2: inverted residuals, a depthwise convolution between two 1x1.

Source: Sandler et al. 2018 (arXiv:1801.04381), table 2, with torchvision's structure.
"""

# ruff: noqa: D102 (what a forward takes and gives stands in its class docstring)

from __future__ import annotations

from torch import Tensor, nn

# expansion, channels, blocks, stride of the first: table 2
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def conv(
    c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1, active: bool = True
) -> nn.Sequential:
    """Convolution, BatchNorm and, if active, ReLU6."""
    layers: list[nn.Module] = [
        nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(c_out),
    ]
    return nn.Sequential(*layers, *([nn.ReLU6(inplace=True)] if active else []))


class Block(nn.Module):
    """1x1 up, 3x3 each channel for itself, 1x1 down; a shortcut where the shape stays."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = c_in * expansion
        up = [conv(c_in, wide)] if expansion > 1 else []
        self.conv = nn.Sequential(*up, conv(wide, wide, 3, stride, wide), conv(wide, c_out, active=False))
        self.shortcut = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.shortcut else y


class MobileNetV2(nn.Module):
    """Images (B, 3, R, R) -> logits (B, classes). No dropout before the head."""

    def __init__(self, n_classes: int = 1000) -> None:
        super().__init__()
        blocks: list[nn.Module] = [conv(3, 32, 3, 2)]
        channels = 32
        for expansion, out, n, stride in STAGES:
            for i in range(n):
                blocks.append(Block(channels, out, stride if i == 0 else 1, expansion))
                channels = out
        self.features = nn.Sequential(*blocks, conv(channels, 1280))
        self.head = nn.Linear(1280, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).mean((2, 3)))
        return logits
