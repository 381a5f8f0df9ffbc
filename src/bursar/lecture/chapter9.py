"""Chapter 9 of the notes: parameters and their initialisation. What needs `probe` comes with it."""

# ruff: noqa: D103 (a claim's row in catalog/lecture.toml says what its function executes)

from __future__ import annotations

import math

import torch
from torch import nn

from bursar.lecture import Claim, Finding, claim, close
from bursar.lecture.traces import traced

N_IN, N_OUT = 16384, 32  # the notes' layer


def _parameter() -> nn.Parameter:
    return nn.Parameter(torch.empty(N_IN, N_OUT, device="meta"))


@claim("9.2")
def registered(notes: Claim) -> Finding:
    module = nn.Module()
    before = len(list(module.parameters()))
    module.w = _parameter()
    after = len(list(module.parameters()))
    return Finding(
        f"a module lists {before} parameters before w is assigned to it and {after} after",
        {"assigned to a module, it is listed": (before, after) == (0, 1)},
        numbers=(before, after),
    )


@claim("9.3")
def is_tensor(notes: Claim) -> Finding:
    found = isinstance(_parameter(), torch.Tensor)
    return Finding(str(found), {"isinstance": found})


@claim("9.4")
def shape(notes: Claim) -> Finding:
    shapes: list[tuple[int, ...]] = []

    def run() -> None:
        x, w = torch.empty(N_IN, device="cuda"), torch.empty(N_IN, N_OUT, device="cuda")
        shapes.append(tuple((x @ w).shape))

    traced(run)
    stored = tuple(nn.Linear(N_IN, N_OUT, device="meta").weight.shape)
    return Finding(
        f"x @ w has {shapes[0][0]} elements; nn.Linear({N_IN}, {N_OUT}) stores {stored}",
        {"x @ w": shapes[0] == (N_OUT,)},
        numbers=(*shapes[0], *stored),
    )


@claim("9.11")
def standard_deviation(notes: Claim) -> Finding:
    found = 1 / math.sqrt(N_IN)
    return Finding(f"{found:.7f}", {"1/√in": close(found, notes.value)}, numbers=(found,))
