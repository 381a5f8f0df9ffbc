"""How each operation is written, and what builds its kernels: one row of `FORMS` for each. No torch.

A builder takes checked shapes and options and gives back the tensors the operation is called with and its forward
kernels. To add an operation: one builder, one row, and its torch call in `measure`.

B batch, H heads, S sequence, d head size; m rows, n columns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bursar import kernels as k
from bursar.errors import BadInput
from bursar.rules import Op, Tensor

__all__ = ["FORMS", "FUSED", "STATES", "Asked", "Form", "Shape", "spell"]

Shape = tuple[int, ...]

_LONGEST_WINDOWED = 10**7  # a window is counted query by query


def spell(shape: Shape) -> str:
    """``2x3x4``, as the command line takes it."""
    return "x".join(map(str, shape))


@dataclass(frozen=True, slots=True)
class Asked:
    """What a form builds from: checked shapes and options."""

    name: str
    shapes: tuple[Shape, ...]
    options: Mapping[str, Any]
    dtype: str

    def tensors(self) -> tuple[Tensor, ...]:
        """A tensor of each shape."""
        return tuple(k.tensor(self.dtype, *s) for s in self.shapes)

    def error(self, why: str) -> BadInput:
        """What was asked, why it cannot be, and how the operation is written."""
        form = FORMS[self.name]
        got = " ".join(spell(s) for s in self.shapes) or "nothing"
        return BadInput(f"{self.name} {got}: {why}; it takes {form.takes}, as in '{form.example}'")


_Built = tuple[tuple[Tensor, ...], tuple[Op, ...]]  # operands, forward kernels


@dataclass(frozen=True, slots=True)
class Form:
    """How one operation is written, and what builds it."""

    example: str
    takes: str
    build: Callable[[Asked], _Built]
    shapes: tuple[int, ...] = (1,)  # how many it may have
    options: tuple[str, ...] = ()
    shrink: Callable[[int, int], bool] = lambda shape, dim: True  # which sizes may be halved and leave its kind of work
    notes: tuple[str, ...] = ()


def _matmul(x: Asked) -> _Built:
    if len(x.shapes) == 1:
        if len(x.shapes[0]) not in (3, 4):
            raise x.error(f"a product has 3 sizes, or 4 with a batch, not {len(x.shapes[0])}")
        *batch, m, inner, n = x.shapes[0]
        a, b = k.tensor(x.dtype, *batch, m, inner), k.tensor(x.dtype, *batch, inner, n)
        return (a, b), (k.matmul(a, b),)
    a, b = x.tensors()
    if len(a.shape) < 2 or len(b.shape) < 2 or (len(b.shape) > 2 and a.shape[:-2] != b.shape[:-2]):
        raise x.error("the factors are matrices, with the same batch in front of both or of the first alone")
    if a.shape[-1] != b.shape[-2]:
        raise x.error(
            f"the inner sizes do not match, {a.shape[-1]} of {spell(a.shape)} and {b.shape[-2]} of {spell(b.shape)}"
        )
    rows = math.prod(a.shape[:-1] if len(b.shape) == 2 else a.shape[:-2])
    if len(b.shape) == 2:  # torch folds the batch into the rows
        return (a, b), (k.matmul(Tensor((rows, a.shape[-1]), a.dtype, a.n_bytes), b),)
    flat = [Tensor((rows, *t.shape[-2:]), t.dtype, t.n_bytes) for t in (a, b)]
    return (a, b), (k.matmul(flat[0], flat[1]),)


def _matvec(x: Asked) -> _Built:
    if len(x.shapes[0]) not in (1, 2):
        raise x.error("a matrix has two sizes; one means a square")
    rows, columns = x.shapes[0][0], x.shapes[0][-1]
    a, b = k.tensor(x.dtype, rows, columns), k.tensor(x.dtype, columns)
    return (a, b), (k.matmul(a, b),)


def _elementwise(x: Asked) -> _Built:
    (t,) = x.tensors()
    return (t,), (k.pointwise(x.name, t),)


def _broadcast(x: Asked) -> _Built:
    a, b = x.tensors() if len(x.shapes) == 2 else x.tensors() * 2
    shape: list[int] = []
    width = max(len(a.shape), len(b.shape))
    padded = [(1,) * (width - len(t.shape)) + t.shape for t in (a, b)]
    for m, n in zip(*padded, strict=True):
        if 1 not in (m, n) and m != n:
            raise x.error(f"{spell(a.shape)} and {spell(b.shape)} do not broadcast, {m} against {n}")
        shape.append(max(m, n))
    return (a, b), (k.pointwise(x.name, a, b, out=k.tensor(x.dtype, *shape)),)


def _copy(x: Asked) -> _Built:
    (t,) = x.tensors()
    return (t,), (k.kernel("clone", [t], self=t),)


def _dropout(x: Asked) -> _Built:
    (t,) = x.tensors()
    return (t,), (k.kernel("native_dropout", [t, k.tensor("bool", *t.shape)], input=t),)


def _reduce(x: Asked) -> _Built:
    (t,) = x.tensors()
    name = {"max": "amax", "min": "amin", "norm": "linalg_vector_norm"}.get(x.name, x.name)
    return (t,), (k.kernel(name, [k.tensor(x.dtype)], self=t),)


def _softmax(x: Asked) -> _Built:
    (t,) = x.tensors()
    return (t,), (k.kernel("_" + x.name, [t], self=t),)


def _layernorm(x: Asked) -> _Built:
    (t,) = x.tensors()
    w = b = k.tensor(x.dtype, t.shape[-1])
    row = k.statistics(t, *t.shape[:-1], 1)
    return (t, w, b), (k.kernel("native_layer_norm", [t, row, row], input=t, weight=w, bias=b),)


def _rmsnorm(x: Asked) -> _Built:
    (t,) = x.tensors()
    w = k.tensor(x.dtype, t.shape[-1])
    return (t, w), (k.kernel("_fused_rms_norm", [t, k.statistics(t, *t.shape[:-1], 1)], input=t, weight=w),)


def _cross_entropy(x: Asked) -> _Built:
    (t,) = x.tensors()
    if len(t.shape) != 2:
        raise x.error(f"logits are tokens x vocabulary, two sizes, not {len(t.shape)}")
    target, one = k.tensor("int64", t.shape[0]), k.tensor(x.dtype)
    picked = k.kernel("nll_loss_forward", [one, one], self=t, target=target)
    return (t, target), (k.kernel("_log_softmax", [t], self=t), picked)


def _mse(x: Asked) -> _Built:
    (t,) = x.tensors()
    return (t, t), (k.kernel("mse_loss", [k.tensor(x.dtype)], self=t, target=t),)


def _convolution(x: Asked) -> _Built:
    spatial = int(x.name.removeprefix("conv").removesuffix("d"))
    shape, filters = x.shapes
    if len(shape) != spatial + 2 or len(filters) != spatial + 1:
        raise x.error(f"{x.name} has {spatial + 2} sizes, then {spatial + 1}, not {len(shape)} and {len(filters)}")
    groups, transposed = x.options.get("groups", 1), x.options.get("transposed", False)
    channels, out_channels, size = shape[1], filters[0], filters[1:]
    if channels % groups or out_channels % groups:
        raise x.error(f"groups={groups} divides not both {channels} input and {out_channels} output channels")
    stride, padding, dilation = (_each(x, name, spatial) for name in ("stride", "padding", "dilation"))
    out = [
        (n - 1) * s - 2 * p + d * (f - 1) + 1 if transposed else (n + 2 * p - d * (f - 1) - 1) // s + 1
        for n, f, s, p, d in zip(shape[2:], size, stride, padding, dilation, strict=True)
    ]
    if min(out) < 1:
        raise x.error(f"the kernel {spell(size)} leaves no output of {spell(shape[2:])}")
    image = k.tensor(x.dtype, *shape)
    leading = (channels, out_channels // groups) if transposed else (out_channels, channels // groups)
    weight = k.tensor(x.dtype, *leading, *size)
    return (image, weight), (k.convolution(image, weight, k.tensor(x.dtype, shape[0], out_channels, *out), transposed),)


def _each(x: Asked, name: str, spatial: int) -> Shape:
    value: Shape = x.options.get(name, (0,) if name == "padding" else (1,))
    if len(value) not in (1, spatial):
        raise x.error(f"{name} has one number or {spatial}, not {len(value)}")
    return value * spatial if len(value) == 1 else value


def _attention(x: Asked) -> _Built:
    if len(x.shapes[0]) != 4:
        raise x.error(f"queries have 4 sizes, batch x heads x sequence x head size, not {len(x.shapes[0])}")
    B, H, S, d = x.shapes[0]
    heads, T, window = x.options.get("kv", H), x.options.get("keys", S), x.options.get("window")
    if H % heads:
        raise x.error(f"{H} query heads cannot share {heads} key and value heads evenly")
    if window is not None and S > _LONGEST_WINDOWED:
        raise x.error(f"a window is counted over {_LONGEST_WINDOWED:,} queries at most")
    q, kv = k.tensor(x.dtype, B, H, S, d), k.tensor(x.dtype, B, heads, T, d)
    return (q, kv, kv), (k.attention(q, kv, kv, causal=x.options.get("causal", False), window=window),)


def _einsum(x: Asked) -> _Built:
    equation = x.options["equation"]
    inputs, arrow, result = equation.partition("->")
    labels = inputs.split(",")
    if not re.fullmatch(r"[A-Za-z]*(,[A-Za-z]*)*(->[A-Za-z]*)?", equation):
        raise x.error(f"{equation!r} is not letters, commas and one -> (an ellipsis has to be written out)")
    if not arrow:  # numpy's rule: what stands once, in alphabetical order
        result = "".join(sorted(s for s in set(inputs) - {","} if inputs.count(s) == 1))
    if len(labels) != len(x.shapes):
        raise x.error(f"{equation!r} has {len(labels)} operands and {len(x.shapes)} shapes are given")
    sizes: dict[str, int] = {}
    for letters, shape in zip(labels, x.shapes, strict=True):
        if len(letters) != len(shape):
            raise x.error(f"{letters!r} has {len(letters)} letters and {spell(shape)} has {len(shape)} sizes")
        for s, n in zip(letters, shape, strict=True):
            if sizes.setdefault(s, n) != n:
                raise x.error(f"{s} is {sizes[s]} in one operand and {n} in {spell(shape)}")
    if len(set(result)) != len(result) or not set(result) <= set(sizes):
        raise x.error(f"the letters of the result {result!r} have to be different ones of the operands")
    distinct = ["".join(dict.fromkeys(letters)) for letters in labels]  # ii is a diagonal, a view
    diagonals = [k.tensor(x.dtype, *(sizes[s] for s in letters)) for letters in distinct]
    return x.tensors(), k.einsum(f"{','.join(distinct)}->{result}", diagonals)


def _embedding(x: Asked) -> _Built:
    if len(x.shapes[0]) != 2 or "tokens" not in x.options:
        raise x.error("a table has two sizes, and tokens=N says how many rows are looked up")
    table, indices = k.tensor(x.dtype, *x.shapes[0]), k.tensor("int64", x.options["tokens"])
    rows = k.tensor(x.dtype, x.options["tokens"], x.shapes[0][1])
    return (table, indices), (k.kernel("embedding", [rows], weight=table, indices=indices),)


# What each optimizer's fused kernel updates beside the parameters
STATES = {
    "adamw": ("_fused_adamw_", "exp_avgs", "exp_avg_sqs"),
    "adam": ("_fused_adam_", "exp_avgs", "exp_avg_sqs"),
    "adagrad": ("_fused_adagrad_", "state_sums"),
    "momentum": ("_fused_sgd_", "momentum_buffer_list"),
}


def _optimizer(x: Asked) -> _Built:
    if len(x.shapes[0]) != 1:
        raise x.error("one number, the parameters")
    (p,) = x.tensors()
    fused, *states = STATES[x.name]
    args = {name: [p] for name in ("self", "grads", *states)}
    op = Op(f"aten.{fused}", args, (), writes=("self", *states), returns_new=False)
    return (p,), (op,)


_CONV_OPTIONS = ("stride", "padding", "dilation", "groups", "transposed", "no-dx")
_A_SHAPE, _ALONG = "a shape", "a shape; it runs along the last size"
_ONE_FLOP = "a function of one element counts as one FLOP, whatever the function"
FUSED = "attention is priced as one fused kernel: the scores never reach memory"
_PAIRWISE = (
    "einsum goes pairwise from the left, as torch does unless opt_einsum is installed; copies that make an operand "
    "dense for bmm are not counted"
)
_STATE_DTYPE = "states and gradients are in the dtype of the parameters"


def _batch_and_space(shape: int, dim: int) -> bool:
    return shape == 0 and dim != 1


def _batch_and_sequence(shape: int, dim: int) -> bool:
    return dim in (0, 2)


def _rows(shape: int, dim: int) -> bool:
    return dim == 0


FORMS: dict[str, Form] = {
    "matmul": Form("matmul 16384x32768x8192", "BxDxK for (B, D) @ (D, K), with a batch in front, or two shapes",
                   _matmul, (1, 2), ("no-dx",)),
    "matvec": Form("matvec 1024x1024", "a matrix, or one size for a square", _matvec, options=("no-dx",)),
    "einsum": Form("einsum 'bij,bjk->bik' 2x3x4 2x4x5", "an equation and a shape for each operand",
                   _einsum, tuple(range(1, 27)), notes=(_PAIRWISE,)),
    **{name: Form(f"{name} 8x64{space} 64{size} padding=1", "the input NxCx(space), then output channels x kernel",
                  _convolution, (2,), _CONV_OPTIONS, _batch_and_space)
       for name, space, size in (("conv1d", "x56", "x3"), ("conv2d", "x56x56", "x3x3"),
                                 ("conv3d", "x8x8x8", "x3x3x3"))},
    "attention": Form("attention 2x4x64x32 causal", "batch x heads x sequence x head size",
                      _attention, (1,), ("kv", "keys", "window", "causal"), _batch_and_sequence, (FUSED,)),
    **{name: Form(f"{name} 4096x4096", _A_SHAPE, _elementwise, notes=(_ONE_FLOP,)) for name in k.UNARY},
    **{name: Form(f"{name} 4096x4096", "a shape, or two that broadcast", _broadcast, (1, 2))
       for name in (*k.BINARY, "maximum", "minimum")},
    "copy": Form("copy 4096x4096", _A_SHAPE, _copy),
    "dropout": Form("dropout 4096x4096", _A_SHAPE, _dropout),
    **{name: Form(f"{name} 4096x4096", "a shape, reduced to one number", _reduce)
       for name in ("sum", "mean", "max", "min", "norm", "var")},
    "softmax": Form("softmax 8192x50257", _ALONG, _softmax),
    "log_softmax": Form("log_softmax 8192x50257", _ALONG, _softmax),
    "layernorm": Form("layernorm 8192x4096", _ALONG, _layernorm),
    "rmsnorm": Form("rmsnorm 8192x4096", _ALONG, _rmsnorm, notes=("rmsnorm is priced as a GPU's fused kernel",)),
    "cross_entropy": Form("cross_entropy 8192x50257", "tokens x vocabulary", _cross_entropy),
    "mse": Form("mse 4096x4096", _A_SHAPE, _mse),
    "embedding": Form("embedding 50257x768 tokens=8192", "the table and tokens=N",
                      _embedding, (1,), ("tokens",), _rows),
    **{name: Form(f"{name} 124M", "the number of parameters", _optimizer, notes=(_STATE_DTYPE,)) for name in STATES},
}  # fmt: skip
