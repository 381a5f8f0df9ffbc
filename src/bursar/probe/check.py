"""The initialisers held to their formulas: variances as predicted and as measured, with the standard error of each.

B rows of standard Gaussian input   out = B × n_out values, of which B·n_out are not independent: theory.independent
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bursar.probe import theory
from bursar.probe.schemes import CUT, SCHEMES, Place, fan, initialise, truncated_variance, truncation
from bursar.report.probe import Check

ROWS = 256
WIDE, NARROW = 16384, 32  # the notes' layer
BRANCHES = 24  # the residual branches of GPT-2 small


def checks(seed: int = 0) -> tuple[Check, ...]:
    """Every initialiser on the notes' layer and on other shapes, and the notes' two calls that miss their mark."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        return tuple(_checks())


def _checks() -> Iterator[Check]:
    for name in SCHEMES:
        for n_in, n_out in ((WIDE, NARROW), (NARROW, WIDE)):
            yield _output(name, n_in, n_out)
    yield _deviation()
    yield _truncated_weights()
    for name in ("xavier", "kaiming"):
        yield from _module(name, "conv 3×3, 64 → 128, 4 groups", nn.Conv2d(64, 128, 3, groups=4, bias=False))
        yield from _module(name, "attention, in_proj 256", nn.MultiheadAttention(256, 4, bias=False))
    yield from _module("fan-in", "embedding, 1000 × 64", nn.Embedding(1000, 64))
    for label, function in (("ReLU", torch.relu), ("GELU", nn.functional.gelu), ("SiLU", nn.functional.silu),
                            ("tanh", torch.tanh)):  # fmt: skip
        yield _activation(label, function)
    yield _notes_truncation()
    yield _notes_shape()


def _place(n_in: int, n_out: int, name: str) -> Place:
    return Place(n_in, n_out, in_first=True, branches=BRANCHES if name == "residual-scaled" else 1)


def _drawn(name: str, n_in: int, n_out: int) -> tuple[Tensor, Tensor]:
    x, w = torch.randn(ROWS, n_in), torch.empty(n_in, n_out)
    SCHEMES[name].fill(w, _place(n_in, n_out, name))
    return x, x @ w


def _relative_error(x: Tensor, n_out: int) -> float:
    """Of E[y²]: the weights' draw on this input, 2/(n_out · d), and the input's own, 2/(B · n_in)."""
    return math.sqrt(2 / (n_out * theory.independent(x)[0]) + 2 / x.numel())


def _output(name: str, n_in: int, n_out: int) -> Check:
    x, y = _drawn(name, n_in, n_out)
    predicted = n_in * SCHEMES[name].variance(_place(n_in, n_out, name))
    where = f"{n_in} → {n_out}" + (f", N = {BRANCHES}" if name == "residual-scaled" else "")
    error = predicted * _relative_error(x, n_out)
    return Check(name, where, "output E[y²]", predicted, theory.second_moment(y), error)


def _deviation() -> Check:
    x, y = _drawn("normal", WIDE, NARROW)
    predicted = math.sqrt(WIDE)
    error = predicted * _relative_error(x, NARROW) / 2  # d√v/√v = dv/2v
    return Check(
        "normal", f"{WIDE} → {NARROW}", "output deviation", predicted, math.sqrt(theory.second_moment(y)), error
    )


def _variance_error(n: int) -> float:
    """Of the mean square of ``n`` independent Gaussians, relative; a cut or uniform one errs less."""
    return math.sqrt(2 / n)


def _truncated_weights() -> Check:
    w = torch.empty(WIDE, NARROW)
    SCHEMES["trunc-normal"].fill(w, _place(WIDE, NARROW, "trunc-normal"))
    predicted, ratio = truncated_variance(-CUT, CUT), theory.second_moment(w) * WIDE
    return Check("trunc-normal", f"{WIDE} × {NARROW}", "weights' σ² n_in", predicted, ratio, _variance_error(w.numel()))


def _module(name: str, where: str, module: nn.Module) -> Iterator[Check]:
    initialise(module, name)
    weight = next(module.parameters())
    n_in, n_out = fan(weight, module)
    predicted, measured = SCHEMES[name].variance(Place(n_in, n_out)), theory.second_moment(weight)
    error = predicted * _variance_error(weight.numel())
    yield Check(name, f"{where}: fans {n_in}, {n_out}", "weights' σ²", predicted, measured, error)


def _activation(label: str, function: Callable[[Tensor], Tensor]) -> Check:
    z = torch.randn(WIDE * NARROW)
    predicted, variance = theory.moments(function, 1.0)
    error = predicted * math.sqrt(variance / z.numel())
    gain = f"{label} of N(0, 1); gain² {1 / predicted:.4g}"
    return Check("activation", gain, "E[f(z)²]", predicted, theory.second_moment(function(z)), error)


def _notes_truncation() -> Check:
    """The notes' trunc_normal_ call, whose bounds are absolute: a plain normal."""
    std = 1 / math.sqrt(WIDE)
    w = nn.init.trunc_normal_(torch.empty(WIDE, NARROW), std=std, a=-3, b=3)
    predicted, ratio = truncated_variance(-3 / std, 3 / std), theory.second_moment(w) / std**2
    where = "the notes: trunc_normal_(std=1/128, a=-3, b=3)"
    return Check(
        "trunc_normal_",
        where,
        "weights' var/std²",
        predicted,
        ratio,
        _variance_error(w.numel()),
        truncation(std, -3, 3),
    )


def _notes_shape() -> Check:
    """The notes' rule std=1/√w.shape[0] on an nn.Linear, which stores (out, in)."""
    layer = nn.Linear(WIDE, NARROW, bias=False)
    nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.weight.shape[0]))
    x = torch.randn(ROWS, WIDE)
    n_in, n_out = fan(layer.weight, layer)
    predicted = n_in / layer.weight.shape[0]
    flag = f"output variance {predicted:.0f}: the std used shape[0], which is fan-out; take shape[1]"
    error = predicted * _relative_error(x, n_out)
    where = f"the notes: std=1/√shape[0] on nn.Linear({n_in}, {n_out})"
    return Check("normal_", where, "output E[y²]", predicted, theory.second_moment(layer(x)), error, flag)
