"""What theory says of the second moment after each torch function: one function per kind, found by name in `RULES`.

A signal travels with its tensor. A rule takes the signals of the inputs and gives the output's, or None where theory is
silent; the path then goes on from what is measured there.

    W weight   N rows of a batch   d independent rows among them   z standard Gaussian
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bursar.probe.schemes import Place

_ROWS = 256  # of a batch are looked at for its independent rows; fewer can only widen a tolerance
_CHUNK = 1024  # values whose squares are summed in fp32
_NORM_ERROR = 1e-3  # relative, of v/(v + ε): a LayerNorm's v is about each token's mean, and differs by token
_GRID = torch.linspace(-12, 12, 24001, dtype=torch.float64)
_DENSITY = torch.exp(-_GRID.square() / 2) / math.sqrt(2 * math.pi) * (24 / 24000)


@dataclass(frozen=True, slots=True)
class Signal:
    """What is known of one tensor's values.

    ``spread`` is the relative variance of ``second`` as an estimate of what will be measured, ``drift`` the same since
    the path began (at the input, an embedding or a norm), ``n`` the independent values in the tensor.
    """

    second: float  # E[x²]
    n: float
    spread: float = 0.0
    drift: float = 0.0
    gaussian: bool = False  # zero-mean and Gaussian, so that an activation's integral is known
    predicted: bool = False  # by theory, as against measured here
    reference: float = 1.0  # E[x²] where the path began
    depth: int = 0  # layers with weights since then
    path: frozenset[int] = frozenset()  # rows it came through since the last norm, or function without a rule
    producers: frozenset[int] = frozenset()  # rows whose output this is, through views, sums and activations


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a torch function: its name, its arguments, its output, and the input signals by argument."""

    name: str
    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    output: Tensor
    inputs: tuple[Signal, ...]

    def get(self, position: int, name: str) -> Any:
        """An argument by position or by name; None if it was left out."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name)


Rule = Callable[[Call], Signal | None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register what theory says of the torch functions of these names."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return register


# ---- what is measured


def square_sum(x: Tensor) -> float:
    """Σx² to nine digits, also where squares overflow x's own dtype."""
    flat = x.detach().reshape(-1)
    if x.dtype == torch.float32 and len(flat) >= _CHUNK:
        # Norms of short rows are vectorised: 3.6 ms for 2048², against 28 ms in double throughout
        rows = flat[: len(flat) // _CHUNK * _CHUNK].view(-1, _CHUNK)
        rest = flat[rows.numel() :].double().square().sum()
        total = float(torch.linalg.vector_norm(rows, dim=1).double().square().sum() + rest)
        if math.isfinite(total) and total > 1e-30 * len(flat):
            return total
    norm = float(torch.linalg.vector_norm(flat, dtype=torch.float64))
    return norm * norm


def second_moment(x: Tensor) -> float:
    """E[x²]; NaN for an empty tensor."""
    return square_sum(x) / x.numel() if x.numel() else math.nan


def independent(x: Tensor, image: bool = False) -> tuple[float, float]:
    """(rows, for activations): how many independent samples a batch amounts to, 1 if all are alike.

    The first is tr(G)²/‖G‖² with G the Gram matrix of the rows; the second also counts a common mean, which a ReLU's
    output feels at first order.
    """
    rows = x.detach().flatten(1) if image and x.dim() > 1 else x.detach().reshape(-1, x.shape[-1] if x.dim() else 1)
    rows = rows[:: max(1, rows.shape[0] // _ROWS)][:_ROWS].double()
    largest = rows.abs().amax() if rows.numel() else torch.zeros(())
    if not (torch.isfinite(largest) and largest > 0):
        return 1.0, 1.0
    rows = rows / largest
    gram = rows @ rows.T
    trace = float(gram.trace())
    alike = trace**2 / float(gram.square().sum())
    return alike, min(alike, len(rows) * trace / max(float(gram.sum()), trace))


# ---- weights


def weight_of(value: Any) -> nn.Parameter | None:
    """The parameter that a tensor is, or is a view of."""
    if isinstance(value, nn.Parameter):
        return value
    return getattr(value, "_bursar_weight", None)


def signal_of(value: Any) -> Signal | None:
    """The signal that travels with a tensor."""
    return getattr(value, "_bursar_signal", None) if isinstance(value, Tensor) else None


@dataclass(frozen=True, slots=True)
class Product:
    """A use of a weight: what it multiplies, its fans there, the bias, and the share of taps inside the input."""

    weight: nn.Parameter
    x: Tensor
    place: Place
    bias: Tensor | None = None
    inside: float = 1.0
    image: bool = False


def product(call: Call) -> Product | None:
    """How a weight multiplies an activation in this call; None where it does not, or not in a way known here."""
    reader = _PRODUCTS.get(call.name)
    return reader(call) if reader is not None else None


def _linear(call: Call) -> Product | None:
    weight = weight_of(call.get(1, "weight"))
    if weight is None:
        return None
    shape = call.get(1, "weight").shape
    return Product(weight, call.get(0, "input"), Place(shape[1], shape[0], shape != weight.shape), call.get(2, "bias"))


def _matmul(call: Call) -> Product | None:
    a, b = call.args[:2]
    return _matrix(a, b, None) or _matrix(b, a, None, left=True)


def _rmatmul(call: Call) -> Product | None:
    b, a = call.args[:2]
    return _matrix(a, b, None) or _matrix(b, a, None, left=True)


def _addmm(call: Call) -> Product | None:
    return _matrix(call.args[1], call.args[2], call.args[0])


def _matrix(x: Any, w: Any, bias: Any, left: bool = False) -> Product | None:
    weight = weight_of(w)
    if weight is None or weight_of(x) is not None or w.dim() < 2:
        return None
    n_in, n_out = (w.shape[-1], w.shape[-2]) if left else (w.shape[-2], w.shape[-1])
    stored_in_first = (w.shape == weight.shape) != left
    return Product(weight, x, Place(n_in, n_out, stored_in_first), bias)


def _einsum(call: Call) -> Product | None:
    """One weight in an einsum: the letters it shares with the other operand, and the output lacks, are summed."""
    operands = call.args[1] if len(call.args) == 2 and isinstance(call.args[1], (list, tuple)) else call.args[1:]
    equation = call.args[0]
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    left, out = equation.replace(" ", "").split("->")
    letters = left.split(",")
    which = [i for i, v in enumerate(operands) if weight_of(v) is not None]
    if len(which) != 1 or len(letters) != 2:
        return None
    w, x, mine = operands[which[0]], operands[1 - which[0]], letters[which[0]].replace("...", "")
    if len(mine) != w.dim():
        return None
    sizes = dict(zip(mine, w.shape, strict=True))
    n_in = math.prod(n for key, n in sizes.items() if key not in out)
    weight = weight_of(w)
    assert weight is not None  # that is how it was chosen
    return Product(weight, x, Place(n_in, w.numel() // n_in, mine[0] not in out))


def _conv(call: Call) -> Product | None:
    weight = weight_of(call.get(1, "weight"))
    if weight is None:
        return None
    x, groups = call.get(0, "input"), call.get(6, "groups") or 1
    taps = math.prod(weight.shape[2:])
    settings = {key: v for i, key in ((3, "stride"), (4, "padding"), (5, "dilation")) if (v := call.get(i, key))}
    size = x.shape[-(weight.dim() - 2) :]
    ones = call.function(torch.ones(1, 1, *size), torch.ones(1, 1, *weight.shape[2:]), **settings)
    place = Place(weight.shape[1] * taps, weight.shape[0] // groups * taps)
    return Product(weight, x, place, call.get(2, "bias"), float(ones.mean()) / taps, image=True)


_PRODUCTS: dict[str, Callable[[Call], Product | None]] = {
    "linear": _linear,
    "matmul": _matmul,
    "mm": _matmul,
    "rmatmul": _rmatmul,
    "addmm": _addmm,
    "einsum": _einsum,
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
}


def after_product(found: Product, x: Signal) -> Signal:
    """E[y²] = fan_in · E[w²] · E[x²] + E[b²], for independent zero-mean weights. Source: He et al. 2015, equation 7.

    Its relative variance over the weights, for this very batch, is 2/(n_out · d): the n_out outputs are independent
    draws of a quadratic form with mean tr(G) and variance 2‖G‖². What the bias adds has no such variance.
    """
    w2 = second_moment(found.weight)
    b2, centred = 0.0, True
    if isinstance(found.bias, Tensor):
        b2 = second_moment(found.bias)
        centred = float(found.bias.detach().double().mean()) ** 2 <= 0.1 * (w2 * found.place.fan_in * x.second + b2)
    n_out = found.weight.shape[0] if found.image else found.place.fan_out
    linear, curved = independent(found.x, found.image)
    second = found.place.fan_in * found.inside * w2 * x.second + b2
    share = 1 - b2 / second if second > 0 and math.isfinite(second) else 1.0  # what the bias adds is known
    own = share * (4 - 2 * share) / (n_out * linear)
    return replace(
        x,
        second=second,
        n=n_out / (share / curved + 1 - share),  # a bias is one number for the whole batch
        spread=share**2 * x.spread + own,
        drift=share**2 * x.drift + own,
        gaussian=centred,
        predicted=True,
        depth=x.depth + 1,
    )


# ---- activations

ACTIVATIONS = (
    "relu relu6 leaky_relu elu selu celu gelu silu mish softplus hardswish hardsigmoid hardtanh tanh sigmoid "
    "logsigmoid tanhshrink softsign square clamp clamp_min threshold erf sin cos"
).split()
RECTIFIERS = frozenset({"relu", "relu6", "clamp_min", "threshold"})  # zero is their resting value
BOUNDED = {"tanh": 1.0, "sigmoid": 1.0, "hardtanh": 1.0, "hardsigmoid": 1.0, "softsign": 1.0}


def moments(function: Callable[[Tensor], Tensor], second: float) -> tuple[float, float]:
    """(E[f(σz)²], its relative variance for one value), σ² = ``second``, by the trapezoid rule on ±12 σ.

    >>> moments(torch.relu, 1.0)[0].__round__(6)
    0.5
    """
    y2 = function(_GRID * math.sqrt(second)).square()
    mean = float((y2 * _DENSITY).sum())
    fourth = float((y2.square() * _DENSITY).sum())
    return mean, (fourth / mean**2 - 1 if mean > 0 else 0.0)


@rule(*ACTIVATIONS)
def activation(call: Call) -> Signal | None:
    """f(σz) integrated over a Gaussian; silent for what is not a zero-mean Gaussian."""
    x = call.inputs[0]
    if not x.gaussian or not math.isfinite(x.second) or not 0 < x.second < 1e100:
        return None
    kwargs = {k: v for k, v in call.kwargs.items() if k not in ("inplace", "input")}
    positional = [a for a in call.args[1:] if not isinstance(a, bool)]

    def f(t: Tensor) -> Tensor:
        out: Tensor = call.function(t.clone(), *positional, **kwargs)
        return out

    second, variance = moments(f, x.second)
    if not second > 0:
        return None
    slope = math.log(moments(f, x.second * 1.01)[0] / second) / math.log(1.01)  # how a relative error goes through
    own = max(0.0, variance - 2 * slope**2) / x.n  # the rest came through x.spread: a Gaussian's E[z⁴] − 1 is 2
    return replace(
        x,
        second=second,
        spread=slope**2 * x.spread + own,
        drift=slope**2 * x.drift + own,
        gaussian=False,
        predicted=True,
    )


# ---- norms, tables, sums, products


@rule("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm")
def norm(call: Call) -> Signal | None:
    """mean(γ²) · v/(v + ε) + mean(β²). Source: Ba, Kiros, Hinton 2016, equation 4."""
    x, name = call.inputs[0], call.name
    at = {"layer_norm": (2, 3, 4), "rms_norm": (2, 9, 3), "batch_norm": (3, 4, 7), "group_norm": (2, 3, 4),
          "instance_norm": (3, 4, 7)}[name]  # fmt: skip
    if name == "batch_norm" and not call.get(5, "training"):
        return None  # running statistics are not this batch's
    gain, shift, eps = call.get(at[0], "weight"), call.get(at[1], "bias"), call.get(at[2], "eps")
    if eps is None:
        eps = torch.finfo(call.output.dtype).eps if name == "rms_norm" else 1e-5
    kept = x.second / (x.second + eps) if x.second + eps > 0 else 0.0
    second = (second_moment(gain) if isinstance(gain, Tensor) else 1.0) * kept
    second += second_moment(shift) if isinstance(shift, Tensor) else 0.0
    own = (1 - kept) ** 2 * x.spread + _NORM_ERROR**2
    count = max(x.n, independent(call.output)[1])
    return Signal(second, count, own, own, gaussian=True, predicted=True, reference=second)


@rule("embedding")
def embedding(call: Call) -> Signal | None:
    """E[w²] of the table: a lookup sums nothing. Its draws are the rows read, each counted once."""
    weight = weight_of(call.get(1, "weight"))
    if weight is None:
        return None
    tokens = call.get(0, "input")
    own = 2 / (weight.shape[1] * max(1, tokens.unique().numel()))
    second = second_moment(weight)
    return Signal(second, 2 / own, own, own, gaussian=True, predicted=True, reference=second, depth=1)


@rule("add", "iadd", "radd", "sub", "isub")
def add(call: Call) -> Signal | None:
    """Second moments add: fresh zero-mean weights make a branch independent of what it is added to."""
    if len(call.inputs) == 1:
        bias = next((w for a in call.args[:2] if (w := weight_of(a)) is not None), None)
        return None if bias is None else replace(call.inputs[0], second=call.inputs[0].second + second_moment(bias))
    a, b = call.inputs
    total = a.second + b.second
    if not total > 0:
        return None
    share = a.second / total
    cross = 4 * share * (1 - share) / min(a.n, b.n)
    older = a if a.depth <= b.depth else b
    return replace(
        older,
        second=total,
        n=min(a.n, b.n),
        spread=share**2 * a.spread + (1 - share) ** 2 * b.spread + cross,
        drift=share**2 * a.drift + (1 - share) ** 2 * b.drift + cross,
        gaussian=a.gaussian and b.gaussian,
        predicted=a.predicted or b.predicted,
        depth=max(a.depth, b.depth),
        producers=a.producers | b.producers,
        path=a.path | b.path,
    )


@rule("mul", "imul", "rmul", "div", "idiv", "truediv", "itruediv")
def multiply(call: Call) -> Signal | None:
    """By a number, its square; of two activations from different weights, the product of their second moments."""
    if len(call.inputs) == 1:
        other = next((a for a in call.args[:2] if isinstance(a, (int, float))), None)
        if other is None or not other:
            return None
        factor = float(other) ** 2
        return replace(call.inputs[0], second=call.inputs[0].second * (1 / factor if "div" in call.name else factor))
    a, b = call.inputs
    if "div" in call.name or a.producers == b.producers or a.producers & b.producers:
        return None
    own = 8 / min(a.n, b.n)  # two Gaussians: E[a⁴]E[b⁴] = 9, of which 1 + 2·2·½ is in theirs already
    return replace(
        a,
        second=a.second * b.second,
        n=min(a.n, b.n),
        spread=a.spread + b.spread + own,
        drift=a.drift + b.drift + own,
        gaussian=False,
        predicted=True,
        depth=max(a.depth, b.depth),
        producers=a.producers | b.producers,
        path=a.path | b.path,
    )


@rule("dropout", "dropout1d", "dropout2d", "dropout3d")
def dropout(call: Call) -> Signal | None:
    """E[x²]/(1 − p) in training: what is kept is scaled by 1/(1 − p). Source: Srivastava et al. 2014, section 10."""
    x, p, training = call.inputs[0], call.get(1, "p"), call.get(2, "training")
    p = 0.5 if p is None else p
    if training is False or p == 0:
        return x
    if p >= 1:
        return None
    own = p / (1 - p) / x.n
    return replace(x, second=x.second / (1 - p), spread=x.spread + own, drift=x.drift + own, gaussian=False)


@rule("cat")
def cat(call: Call) -> Signal | None:
    """Parts of one signal laid side by side, as in rotary positions; silent for different ones."""
    tensors = call.get(0, "tensors")
    if len(call.inputs) != len(tensors) or len({(s.second, s.predicted) for s in call.inputs}) != 1:
        return None
    return call.inputs[0]


VIEWS = frozenset(
    "view reshape transpose permute split chunk unbind getitem contiguous flatten unflatten unsqueeze squeeze expand "
    "expand_as repeat_interleave to float type_as clone detach narrow select movedim swapaxes t T mT get __get__ "
    "view_as reshape_as repeat roll flip identity".split()
)
