"""The initialisers: one row each, with the variance it gives, what that preserves, and its source.

    n_in fan-in: the values one output sums   n_out fan-out: the outputs one value reaches   σ² variance of a weight

An output is a sum of n_in products, so Var(out) = n_in · σ² · E[x²] (He et al. 2015, equation 7); a gradient with
respect to an input is a sum of n_out. Both stay at 1 only where n_in = n_out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bursar.errors import BadInput, UnknownName
from bursar.report.probe import SchemeLine

CUT = 3.0  # where trunc-normal cuts, in σ: CS336 assignment 1, section 3.4.1
_SURELY = 6.0  # bounds beyond this many σ touch no weight: 2e-9 of a Gaussian lies outside


@dataclass(frozen=True, slots=True)
class Place:
    """Where a weight stands: its fans, how it is stored, what follows, and the model's branches if it ends one."""

    fan_in: int
    fan_out: int
    in_first: bool = False  # stored (in, out), as in x @ w; nn.Linear stores (out, in)
    branches: int = 1
    follows: str | None = "relu"  # the torch function its output goes through; None where a probe saw none


@dataclass(frozen=True, slots=True)
class Scheme:
    """One initialiser: ``variance(place)`` is what it gives a weight, ``fill(weight, place)`` writes the weight."""

    name: str
    formula: str
    preserves: str
    source: str
    variance: Callable[[Place], float]
    fill: Callable[[Tensor, Place], object]

    @property
    def line(self) -> SchemeLine:
        """The row of the catalogue's page."""
        return SchemeLine(self.name, self.formula, self.preserves, self.source)


def truncated_variance(a: float, b: float) -> float:
    """The variance of a standard Gaussian cut to [a, b], a < b in σ.

    Source: Johnson, Kotz, Balakrishnan 1994, Continuous Univariate Distributions, volume 1, section 13.10.1.

    >>> round(truncated_variance(-3, 3), 4)
    0.9733
    """
    if not a < b:
        raise BadInput(f"a truncated normal's lower bound must be below the upper, not {a} and {b}")

    def density(z: float) -> float:
        return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    mass = (math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2))) / 2
    shift = (density(a) - density(b)) / mass
    return 1 + (a * density(a) - b * density(b)) / mass - shift**2


def truncation(std: float, a: float = -2.0, b: float = 2.0) -> str:
    """What is wrong with ``trunc_normal_(w, std=std, a=a, b=b)``, or nothing. The bounds of torch are absolute.

    >>> truncation(1 / 128, -3, 3)
    'bounds ±3 are 384 σ: nothing is truncated; write a=-3*std, b=3*std'
    >>> truncation(1 / 128, -3 / 128, 3 / 128)
    ''
    """
    if std <= 0 or min(-a, b) < _SURELY * std:
        return ""
    bounds = f"±{b:g}" if a == -b else f"{a:g}, {b:g}"
    return f"bounds {bounds} are {min(-a, b) / std:.4g} σ: nothing is truncated; write a=-3*std, b=3*std"


def gain(follows: str | None) -> float:
    """By what weights are scaled for the function that follows: torch's own where it has one, else 1/√E[f(z)²].

    >>> round(gain("relu") ** 2, 4), round(gain(None), 4), round(gain("gelu") ** 2, 2)
    (2.0, 1.0, 2.35)
    """
    name = follows or "linear"
    try:
        return float(nn.init.calculate_gain(name))  # type: ignore[arg-type]
    except ValueError:
        function = getattr(nn.functional, name, None) or getattr(torch, name)
        z = torch.linspace(-12, 12, 24001, dtype=torch.float64)
        density = torch.exp(-z.square() / 2) * (z[1] - z[0]) / math.sqrt(2 * math.pi)
        return 1 / math.sqrt(float((function(z).square() * density).sum()))


def _normal(variance: Callable[[Place], float]) -> Callable[[Tensor, Place], object]:
    return lambda w, place: nn.init.normal_(w, std=math.sqrt(variance(place)))


def _truncated(w: Tensor, place: Place) -> Tensor:
    std = 1 / math.sqrt(place.fan_in)
    return nn.init.trunc_normal_(w, std=std, a=-CUT * std, b=CUT * std)


def _orthogonal(w: Tensor, place: Place) -> None:
    """Fill the matrix that takes an input to an output, whatever the order it is stored in."""
    outputs = w.numel() // place.fan_in
    matrix = nn.init.orthogonal_(torch.empty(outputs, place.fan_in, dtype=torch.float32))
    with torch.no_grad():
        w.copy_((matrix.T if place.in_first else matrix).reshape(w.shape))


_Variance = Callable[[Place], float]


def _row(name: str, formula: str, preserves: str, source: str, variance: _Variance,
         fill: Callable[[Tensor, Place], object] | None = None) -> Scheme:  # fmt: skip
    return Scheme(name, formula, preserves, source, variance, fill or _normal(variance))


SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        _row(
            "normal", "1", "nothing: the output's variance is n_in", "the notes' chapter 9, torch.randn", lambda p: 1.0
        ),
        _row(
            "fan-in",
            "1/n_in",
            "forward, linear layers",
            "LeCun et al. 1998, Efficient BackProp, equation 16",
            lambda p: 1 / p.fan_in,
        ),
        _row(
            "xavier",
            "2/(n_in + n_out)",
            "the mean of forward and backward, linear or tanh",
            "Glorot, Bengio 2010, equation 12",
            lambda p: 2 / (p.fan_in + p.fan_out),
        ),
        _row(
            "kaiming",
            "gain²/n_in",
            "forward through what follows: gain² = 2 before a ReLU, which halves E[x²]",
            "He et al. 2015, equation 10; torch.nn.init.calculate_gain",
            lambda p: gain(p.follows) ** 2 / p.fan_in,
        ),
        _row(
            "trunc-normal",
            "0.9733/n_in",
            "forward, but for 2.7 %; no weight beyond 3 σ",
            "CS336 assignment 1, section 3.4.1",
            lambda p: truncated_variance(-CUT, CUT) / p.fan_in,
            _truncated,
        ),
        _row(
            "orthogonal",
            "1/max(n_in, n_out)",
            "lengths, exactly, where n_in ≤ n_out; E[y²] = n_in/max",
            "Saxe et al. 2014, section 3",
            lambda p: 1 / max(p.fan_in, p.fan_out),
            _orthogonal,
        ),
        _row(
            "residual-scaled",
            "1/n_in, over the number of branches N where one ends",
            "forward along a residual stream of N branches; as in GPT-2, no gain for what follows",
            "Radford et al. 2019, section 2.3: 1/√N on the weights",
            lambda p: 1 / (p.fan_in * p.branches),
        ),
    )
}


def scheme(name: str) -> Scheme:
    """The initialiser of that name. Raises UnknownName."""
    if name not in SCHEMES:
        raise UnknownName("initialiser", name, SCHEMES, "bursar probe --schemes shows them.")
    return SCHEMES[name]


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fan(parameter: Tensor, module: nn.Module | None = None) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight in its module: the values an output sums, the outputs a value reaches.

        nn.Linear (out, in)                     in, out
        nn.Conv (out, in/groups, k…)            in/groups · k, out/groups · k;  torch's own rule leaves the groups out
        nn.ConvTranspose (in, out/groups, k…)   in/groups · k, out/groups · k
        nn.Embedding (V, D)                     1, D: a lookup reads one row and sums nothing
        nn.MultiheadAttention, in_proj (3D, D)  D, D: three matrices stacked
        any other matrix                        shape[-2], shape[-1], as in x @ w;  a probe sees how it is really used

    Raises BadInput for a parameter with fewer than two dimensions.
    """
    if parameter.dim() < 2:
        raise BadInput(f"a parameter of shape {tuple(parameter.shape)} has no fan-in: it multiplies value by value")
    taps = math.prod(parameter.shape[2:])
    if isinstance(module, _CONVOLUTIONS):
        return parameter.shape[1] * taps, parameter.shape[0] // module.groups * taps
    if isinstance(module, _TRANSPOSED):
        return parameter.shape[0] // module.groups * taps, parameter.shape[1] * taps
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return 1, parameter.shape[1]
    if isinstance(module, nn.MultiheadAttention):
        packed = parameter is module.in_proj_weight
        return parameter.shape[1], parameter.shape[0] // (3 if packed else 1)
    if isinstance(module, nn.Linear):
        return parameter.shape[1], parameter.shape[0]
    return parameter.shape[-2], parameter.shape[-1]


def is_in_first(module: nn.Module | None) -> bool:
    """Whether a matrix of this module is stored (in, out) as far as its class tells."""
    known = (nn.Linear, nn.MultiheadAttention, nn.Embedding, *_CONVOLUTIONS)
    return not isinstance(module, known)


def places(model: nn.Module) -> dict[nn.Parameter, Place]:
    """Every weight of two dimensions or more, by its module's class. A shared one takes the use that sums the most."""
    found: dict[nn.Parameter, Place] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() >= 2:
                place = Place(*fan(parameter, module), is_in_first(module))
                if parameter not in found or place.fan_in > found[parameter].fan_in:
                    found[parameter] = place
    return found


@torch.no_grad()
def initialise(model: nn.Module, name: str, seen: dict[nn.Parameter, Place] | None = None) -> None:
    """Fill every weight of ``model`` by the scheme, in place; biases become 0, the vectors of norms stay.

    ``seen`` says how a probe saw weights used, for matrices whose module's class does not tell. Draws from torch's
    generator. Raises UnknownName.
    """
    rule = scheme(name)
    where = places(model) | (seen or {})
    for parameter, place in where.items():
        rule.fill(parameter, place)
    for module in model.modules():
        own = list(module.named_parameters(recurse=False))
        if any(p in where for _, p in own):
            for key, parameter in own:
                if parameter.dim() == 1 and "bias" in key:
                    parameter.zero_()
