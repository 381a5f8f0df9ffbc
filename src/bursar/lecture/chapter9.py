"""Chapter 9 of the notes: parameters and their initialisation, with real random numbers from seeded generators.

    B rows of x   n_in fan-in   n_out fan-out   σ standard deviation of a weight

A weight here is stored (in, out), as in the notes' ``x @ w``. A sample stands near its expectation when it is within
four standard errors; the page says the size of the sample or the tolerance that follows from it.
"""

# ruff: noqa: D103 (a claim's row in catalog/lecture.toml says what its function executes)

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bursar.lecture import Claim, Finding, claim, close, shared
from bursar.lecture.traces import traced
from bursar.units import format_share

N_IN, N_OUT = 16384, 32  # the notes' layer
SQUARE = 1024
B = 256
CUT = 3  # where the notes mean to truncate, in σ
SEED = 9

Initialiser = Callable[[Tensor, torch.Generator], object]


def _parameter() -> nn.Parameter:
    return nn.Parameter(torch.empty(N_IN, N_OUT, device="meta"))


# ---- samples, and how near they must come


def _generator(seed: int = SEED) -> torch.Generator:
    """Random numbers of the claim's own: the process's generator is not touched."""
    return torch.Generator().manual_seed(seed)


@shared
def _x(n_in: int, rows: int = B) -> Tensor:
    """Inputs of mean 0 and variance 1."""
    return torch.randn(rows, n_in, generator=_generator(SEED + 1))


def _weight(init: Initialiser, n_in: int = N_IN, n_out: int = N_OUT) -> Tensor:
    w = torch.empty(n_in, n_out)
    init(w, _generator())
    return w


def _normal(std: float) -> Initialiser:
    return lambda w, g: nn.init.normal_(w, std=std, generator=g)


def _xavier(w: Tensor, g: torch.Generator) -> Tensor:
    return nn.init.xavier_normal_(w, generator=g)


def _kaiming(w: Tensor, g: torch.Generator) -> Tensor:
    return nn.init.kaiming_normal_(w.t(), nonlinearity="relu", generator=g)  # torch reads fan-in off (out, in)


def _truncated(std: float, bound: float) -> Initialiser:
    return lambda w, g: nn.init.trunc_normal_(w, std=std, a=-bound, b=bound, generator=g)


def _variance(init: Initialiser, n_in: int = N_IN, n_out: int = N_OUT) -> float:
    """Variance of ``x @ w``."""
    return float((_x(n_in) @ _weight(init, n_in, n_out)).var())


def _variance_back(init: Initialiser, n_in: int, n_out: int) -> float:
    """Variance of the gradient that ``x @ w`` hands to x, where the output's gradient has variance 1."""
    return float((_x(n_out) @ _weight(init, n_in, n_out).t()).var())


def tolerance(n_in: int = N_IN, n_out: int = N_OUT) -> float:
    """Four standard errors of the variance of ``x @ w``, as a share of it, for Gaussian x (B, n_in) and w.

    The outputs share rows and columns, so the variance of their mean square is 2/(B·out) + 2/(B·in) + 2/(in·out): from
    the fourth moment of a Gaussian, E[x⁴] = 3, summed over the pairs of outputs.
    """
    return 4 * math.sqrt(2 / (B * n_out) + 2 / (B * n_in) + 2 / (n_in * n_out))


def _spread(n: int) -> float:
    """Four standard errors of the variance of n independent Gaussian values, as a share of it."""
    return 4 * math.sqrt(2 / n)


def _says(share: float) -> str:
    return f"±{format_share(share)}"


# ---- parameters


@claim("9.1")
def title(notes: Claim) -> Finding:
    w = nn.Parameter(torch.empty(N_IN, N_OUT, device="meta"))

    def section() -> None:
        w = nn.Parameter(torch.empty(N_IN, N_OUT, device="cuda"))
        nn.init.trunc_normal_(w, std=1 / math.sqrt(N_IN), a=-CUT, b=CUT)
        torch.empty(N_IN, device="cuda") @ w

    backward = traced(section).flops.backward
    return Finding(
        f"the section's code makes {w.numel()} parameters, initialises them and does {backward} FLOP of gradients",
        {"its code computes gradients": backward > 0},
        numbers=(w.numel(), backward),
    )


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


# ---- without scaling


@claim("9.5")
def unscaled(notes: Claim) -> Finding:
    y = _x(N_IN) @ _weight(_normal(1))
    std, mean, size = float(y.std()), float(y.mean()), float(y.abs().mean())
    near = tolerance() / 2  # a standard deviation is off by half as much as a variance
    return Finding(
        f"standard deviation {std:.1f} ({_says(near)}: {y.numel()} outputs), mean {mean:.1f}, mean |out| {size:.1f}",
        {"as their standard deviation": close(std, notes.value, near)},
        {"as what an output is": close(size, notes.value, near)},
        numbers=(std, mean, size),
    )


@claim("9.6")
def growing_gradients(notes: Claim) -> Finding:
    depths, widths = (1, 2, 4, 8), (64, 128, 256, 512)
    by_depth = [_gradient(64, depth) for depth in depths]
    by_width = [_gradient(width, 1) for width in widths]
    per_layer = (by_depth[-1] / by_depth[0]) ** (1 / (depths[-1] - depths[0]))
    return Finding(
        f"gradient of x through {', '.join(map(str, depths))} layers of width 64: "
        + ", ".join(f"{g:.3g}" for g in by_depth)
        + f" (root mean square), {per_layer:.2f} times per layer; through one layer of width "
        f"{', '.join(map(str, widths))}: " + ", ".join(f"{g:.3g}" for g in by_width),
        {"in depth": _exponential(depths, by_depth), "in the width of one layer": _exponential(widths, by_width)},
        numbers=(*by_depth, *by_width, per_layer),
    )


def _gradient(D: int, depth: int) -> float:
    """Root mean square of the gradient of x after ``depth`` unscaled layers (D, D), the output's being 1."""
    generator = _generator()
    g = _x(D)
    for _ in range(depth):
        g = g @ torch.randn(D, D, generator=generator).t()
    return float(g.square().mean().sqrt())


def _exponential(x: Sequence[int], y: Sequence[float]) -> bool:
    """Whether log y rises along x in a straight line, to a tenth."""
    slopes = [math.log(y[i + 1] / y[i]) / (x[i + 1] - x[i]) for i in range(len(x) - 1)]
    return all(close(slope, slopes[0], 0.1) for slope in slopes)


# ---- scaled


@claim("9.7")
def variance_scaling(notes: Claim) -> Finding:
    w = _weight(_normal(1 / math.sqrt(N_IN)))
    found = {factor**2: float((factor * _x(N_IN) @ w).var()) for factor in (1, 2)}
    return Finding(
        ", ".join(f"E[x²] = {square}: {variance:.3f}" for square, variance in found.items())
        + f" ({_says(tolerance())})",
        {f"E[x²] = {square}": close(v, notes.value, tolerance()) for square, v in found.items()},
        numbers=tuple(found.values()),
    )


@claim("9.8")
def scaled_outputs(notes: Claim) -> Finding:
    low, high = (float(n) for n in notes.notes.split("-"))
    size = (_x(N_IN) @ _weight(_normal(1 / math.sqrt(N_IN)))).abs()
    inside = float(((size >= low) & (size <= high)).float().mean())
    above, below = float((size > high).float().mean()), float((size < low).float().mean())
    return Finding(
        f"{format_share(inside, 0)} of {size.numel()} outputs lie there in size, {format_share(above, 0)} above and "
        f"{format_share(below, 0)} below",
        {"most of them": inside > 0.5},
        {"all but one in twenty": inside > 0.95},
        numbers=(inside, above, below),
    )


@claim("9.9")
def xavier(notes: Claim) -> Finding:
    found, formula = float(_weight(_xavier).var()), 2 / (N_IN + N_OUT)
    near = _spread(N_IN * N_OUT)
    return Finding(
        f"torch's xavier_normal_ on ({N_IN}, {N_OUT}): {found:.4e}, the formula {formula:.4e} ({_says(near)})",
        {"2/(in + out)": close(found, formula, near)},
        numbers=(found, formula),
    )


@claim("9.10")
def xavier_of_wide_input(notes: Claim) -> Finding:
    found = float(_weight(_xavier).var())
    near = _spread(N_IN * N_OUT)
    return Finding(
        f"{found * N_IN:.3f}/in at in = {N_IN}, out = {N_OUT} ({_says(near)})",
        {"in much larger than out": close(found, 1 / N_IN, near)},
        numbers=(found * N_IN,),
    )


@claim("9.11")
def standard_deviation(notes: Claim) -> Finding:
    found = 1 / math.sqrt(N_IN)
    return Finding(f"{found:.7f}", {"1/√in": close(found, notes.value)}, numbers=(found,))


# ---- truncated


@claim("9.12")
def bounds(notes: Claim) -> Finding:
    std = 1 / math.sqrt(N_IN)
    as_written, in_sigma = _weight(_truncated(std, CUT)).abs(), _weight(_truncated(std, CUT * std)).abs()
    beyond = int((as_written > CUT * std).sum())
    return Finding(
        f"max |w| {float(as_written.max()):.4f}, {beyond} of {as_written.numel()} weights beyond ±{CUT * std:.4f}: the "
        f"bounds are ±{CUT / std:g} σ; with a=-{CUT}*std, b={CUT}*std max |w| is {float(in_sigma.max()):.4f}",
        {"no weight is beyond": beyond == 0},
        numbers=(float(as_written.max()), beyond, float(in_sigma.max())),
    )


@claim("9.13")
def within_three_sigma(notes: Claim) -> Finding:
    std = 1 / math.sqrt(N_IN)
    weights = {"as written": _weight(_truncated(std, CUT)), "cut at 3σ": _weight(_truncated(std, CUT * std))}
    inside = {name: float((w.abs() <= CUT * std).double().mean()) for name, w in weights.items()}
    variance = float(weights["cut at 3σ"].var()) / std**2
    stated = notes.value / 100
    near = (
        4 * math.sqrt(stated * (1 - stated) / (N_IN * N_OUT)) + 0.0005
    )  # a proportion's error, and the notes' rounding
    return Finding(
        ", ".join(f"{name} {format_share(share, 2)}" for name, share in inside.items())
        + f" with variance {variance:.4f} σ² ({_says(_spread(N_IN * N_OUT))})",
        {"of a Gaussian that nothing cuts": abs(inside["as written"] - stated) < near},
        {"after truncation": abs(inside["cut at 3σ"] - stated) < near},
        numbers=(*inside.values(), variance),
    )


# ---- the table


@claim("9.14")
def row_of_unscaled(notes: Claim) -> Finding:
    found = {n_in: _variance(_normal(1), n_in) for n_in in (1024, 4096, N_IN)}
    return Finding(
        ", ".join(f"in = {n_in}: {variance:.0f}" for n_in, variance in found.items()) + f" ({_says(tolerance(1024))})",
        {f"in = {n_in}": close(variance, n_in, tolerance(n_in)) for n_in, variance in found.items()},
        numbers=tuple(found.values()),
    )


@claim("9.15")
def two_notations(notes: Claim) -> Finding:
    first, second = 1 / math.sqrt(N_IN), 2 / (N_IN + N_IN)
    as_std, as_variance = ([_variance(_normal(f(n)), N_IN) for n in (first, second)] for f in (lambda n: n, math.sqrt))
    near = tolerance()
    return Finding(
        f"output variance, in = out, with 1/√in and 2/(in + out) as standard deviations: {as_std[0]:.3f} and "
        f"{as_std[1]:.2g}; as variances: {as_variance[0]:.1f} and {as_variance[1]:.3f} ({_says(near)})",
        {"the first as a std": close(as_std[0], 1, near), "the second as a variance": close(as_variance[1], 1, near)},
        {"one reading serves both": any(all(close(v, 1, near) for v in pair) for pair in (as_std, as_variance))},
        numbers=(*as_std, *as_variance),
    )


@claim("9.16")
def row_of_xavier(notes: Claim) -> Finding:
    sizes = ((SQUARE, SQUARE), (N_IN, N_OUT), (N_OUT, N_IN))
    found = {size: _variance(_xavier, *size) for size in sizes}
    return Finding(
        ", ".join(f"{n_in} → {n_out}: {v:.3g} ({_says(tolerance(n_in, n_out))})" for (n_in, n_out), v in found.items()),
        {f"{n_in} → {n_out}": close(v, 1, tolerance(n_in, n_out)) for (n_in, n_out), v in found.items()},
        numbers=tuple(found.values()),
    )


@claim("9.17")
def row_of_truncated(notes: Claim) -> Finding:
    std = 1 / math.sqrt(N_IN)
    found = _variance(_truncated(std, CUT * std))
    return Finding(
        f"{found:.3f} ({_says(tolerance())})", {"within a tenth of 1": abs(found - 1) < 0.1}, numbers=(found,)
    )


@claim("9.18")
def shape_zero(notes: Claim) -> Finding:
    stored = {"w of x @ w": torch.empty(N_IN, N_OUT), "nn.Linear's weight": torch.empty(N_OUT, N_IN)}
    found = {}
    for name, w in stored.items():
        nn.init.normal_(w, std=1 / math.sqrt(w.shape[0]), generator=_generator())
        found[name] = float((_x(N_IN) @ (w if w.shape[0] == N_IN else w.t())).var())
    first, second = found
    near = tolerance()
    return Finding(
        ", ".join(f"{name} {tuple(stored[name].shape)}: output variance {v:.4g}" for name, v in found.items())
        + f" ({_says(near)}); in/out is {N_IN // N_OUT}",
        {first: close(found[first], 1, near)},
        {second: close(found[second], 1, near)},
        numbers=tuple(found.values()),
    )


# ---- activations, checks, and both directions


@claim("9.19")
def activations(notes: Claim) -> Finding:
    z = torch.randn(1024, SQUARE, generator=_generator())
    y = F.relu(z)
    half, variance = float(y.square().mean() / z.square().mean()), float(y.var())
    near = 4 * math.sqrt(5 / z.numel())  # E[relu⁴]/E[relu²]² = 6
    linear = _variance(_xavier, SQUARE, SQUARE)
    n_in, n_out = 512, 4096
    after = float((F.relu(_x(n_in)) @ _weight(_kaiming, n_in, n_out)).square().mean())
    columns = 4 * math.sqrt(2 / n_out)  # the rows share relu's mean, so count the columns alone
    return Finding(
        f"ReLU: E[y²]/E[x²] {half:.4f} ({_says(near)}), Var[y] {variance:.4f}; then Kaiming, E[z²] {after:.3f} "
        f"({_says(columns)}); Xavier through a square linear layer {linear:.3f} ({_says(tolerance(SQUARE, SQUARE))})",
        {
            "ReLU halves the second moment": close(half, 0.5, near),
            "Kaiming restores it": close(after, 1, columns),
            "Xavier keeps it where nothing bends": close(linear, 1, tolerance(SQUARE, SQUARE)),
        },
        numbers=(half, variance, after, linear),
    )


@claim("9.20")
def snippet(notes: Claim) -> Finding:
    rows, D, again = 16, 64, 400
    generator = _generator()
    x = torch.randn(rows, D, generator=generator)
    firsts, outputs = [], []
    for _ in range(again):
        w1, w2 = torch.randn(D, D, generator=generator) / math.sqrt(D), torch.randn(D, 1, generator=generator)
        firsts.append(x @ w1)
        outputs.append(x @ w1 @ (w2 / math.sqrt(D)))
    first = torch.stack(firsts)
    variances = torch.stack([y.var() for y in outputs])
    low, high = (float(variances.quantile(q)) for q in (0.05, 0.95))
    bent = F.relu(first)
    inside = float(((variances - 1).abs() < 0.1).float().mean())
    ideal = close(float(first.var()), 1, 0.1) and abs(float(first.mean())) < 0.1
    return Finding(
        f"it prints {tuple(outputs[0].shape)} outputs of the model where the first layer has {tuple(firsts[0].shape)}; "
        f"over {again} seeds their variance is {low:.2f} to {high:.2f} (5 % to 95 %); the first layer's is "
        f"{float(first.var()):.2f}, after a ReLU the mean is {float(bent.mean()):.2f} and the variance "
        f"{float(bent.var()):.2f}",
        {"mean 0 and variance 1 for a scaled linear layer": ideal},
        {
            "it shows the first layer": outputs[0].shape == firsts[0].shape,
            f"{rows} numbers show a variance to a tenth": inside > 0.9,
            "mean 0 after a ReLU": abs(float(bent.mean())) < 0.1,
        },
        numbers=(low, high, float(first.var()), float(bent.mean()), float(bent.var())),
    )


@claim("9.21")
def both_directions(notes: Claim) -> Finding:
    cases: dict[str, tuple[Initialiser, int, int]] = {
        "Xavier, square": (_xavier, SQUARE, SQUARE),
        f"Xavier, {N_IN} → {N_OUT}": (_xavier, N_IN, N_OUT),
        f"Kaiming / 2, {N_IN} → {N_OUT}": (_kaiming_linear, N_IN, N_OUT),
    }
    found = {name: (_variance(*case), _variance_back(*case)) for name, case in cases.items()}
    kept = {
        name: all(close(v, 1, max(tolerance(i, o), tolerance(o, i))) for v in found[name])
        for name, (_, i, o) in cases.items()
    }
    square, *others = cases
    return Finding(
        "; ".join(f"{name}: forward {f:.3g}, backward {b:.3g}" for name, (f, b) in found.items())
        + f" ({_says(tolerance(N_IN, N_OUT))})",
        {square: kept[square]},
        {name: kept[name] for name in others},
        numbers=tuple(v for pair in found.values() for v in pair),
    )


def _kaiming_linear(w: Tensor, g: torch.Generator) -> Tensor:
    """Kaiming with the gain of a linear layer: 1/fan-in."""
    return nn.init.kaiming_normal_(w.t(), nonlinearity="linear", generator=g)
