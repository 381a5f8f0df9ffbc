"""What the chapters' claims look at: steps, single operations and whole models, each traced once per execution.

B batch   D width   K width out   S sequence   L layers   P parameters
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bursar import architecture
from bursar.hardware import accelerator
from bursar.lecture import shared
from bursar.ledger import Ledger
from bursar.report.gradients import Layer, layers
from bursar.roofline import op_seconds
from bursar.rules import MODEL_KINDS
from bursar.trace import tracing
from bursar.workload import step as workload

NOTES_SIZES = ((1024, 256, 64), (64, 512, 10), (3, 5, 7))  # B, D, K: the notes give none, so any will do


@shared
def step(model: str, **options: Any) -> Ledger:
    """One training step of a named model."""
    return workload.step(model, **options)


def traced(run: Callable[[], object]) -> Ledger:
    """The ledger of what ``run`` does on the fake accelerator."""
    with tracing() as session:
        run()
    return session.ledger


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor on the accelerator; made inside a trace it holds no data."""
    return torch.zeros(shape, device="cuda", dtype=dtype)


@shared
def matmul_flops(m: int, k: int, n: int) -> int:
    """FLOPs of (m, k) @ (k, n)."""
    return traced(lambda: zeros(m, k) @ zeros(k, n)).flops.forward


def two_layer(B: int, D: int, K: int) -> Ledger:
    """A step of the notes' network of chapter 8, x -> w1 (D, D) -> w2 (D, K)."""
    return step(f"two-layer:D={D},K={K}", batch_size=B)


def two_layer_rows(B: int, D: int, K: int) -> tuple[Layer, Layer]:
    """Its table of gradients: the rows of w1 and w2."""
    first, second = layers(two_layer(B, D, K))
    return first, second


def module_step(module: nn.Module, x: torch.Tensor) -> Ledger:
    """A step of ``module`` on ``x``, the loss the mean of its output."""
    return workload.step(module, x)


def products(ledger: Ledger) -> int:
    """FLOPs of every product of matrices, convolutions and attention included, in all phases."""
    return sum(ledger.flops.by_kind[kind] for kind in MODEL_KINDS)


def product_share(ledger: Ledger) -> float:
    """Products' share of all FLOPs."""
    return products(ledger) / ledger.flops.total


def seconds_by_kind(ledger: Ledger, device: str) -> dict[str, float]:
    """Roofline seconds of each kind on a device of the catalogue."""
    found: dict[str, float] = {}
    for row in ledger.recorded:
        found[row.kind] = found.get(row.kind, 0.0) + max(op_seconds(row, accelerator(device)))
    return found


def product_time_share(ledger: Ledger, device: str) -> float:
    """Products' share of the roofline seconds."""
    found = seconds_by_kind(ledger, device)
    return sum(s for kind, s in found.items() if kind in MODEL_KINDS) / sum(found.values())


@dataclass(frozen=True, slots=True)
class Whole:
    """A model too large to trace layer by layer within seconds: its step, from one and two of its equal layers."""

    parameters: int
    tokens: int
    model_flops: int
    attention_flops: int  # forward and backward, the scores' recomputation left out
    attention_full_square_flops: int

    @property
    def six_p_tokens(self) -> int:
        """The rule of thumb."""
        return 6 * self.parameters * self.tokens


@shared
def whole(name: str, seq_len: int) -> Whole:
    """A step of one sequence of the transformer ``name``, all its layers; each layer after the first costs the same."""
    shape = architecture.preset(name)
    assert isinstance(shape, architecture.Transformer)
    one, two = (_counts(step(f"{name}:L={n}", batch_size=1, seq_len=seq_len, precision="bf16-mixed")) for n in (1, 2))
    return Whole(
        shape.parameters(), seq_len, *(a + (shape.n_layers - 1) * (b - a) for a, b in zip(one, two, strict=True))
    )


def _counts(ledger: Ledger) -> tuple[int, int, int]:
    rows = [r.work for r in ledger.recorded if r.kind == "attention" and r.phase != "recompute"]
    return ledger.flops.model, sum(w.flops for w in rows), sum(w.full_square_flops for w in rows)
