"""One operation, named and priced: ``price(parse("matmul 16384x32768x8192"), accelerator("h100-sxm"))``. No torch.

The language is a name, shapes and options; every form is a row of `FORMS`, with an example. `parse` turns the text into
kernels (`kernels`), `rules` counts each, `roofline` bounds each on a device; nothing is counted here.

    matmul 16384x32768x8192                       (B, D) @ (D, K); 8x512x64x512 has a batch in front
    matmul 16384x32768 @ 32768x8192               the same, both shapes written out
    conv2d 8x3x224x224 64x7x7 stride=2 padding=3  input NxCxHxW, then output channels x kernel
    attention 2x4x64x32 causal                    batch x heads x sequence x head size
    einsum 'bij,bjk->bik' 2x3x4 2x4x5
    gelu 4096x4096 backward                       `backward` after an operation: its backward kernels alone
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bursar import kernels as k
from bursar import rules
from bursar.errors import BadInput, UnknownName
from bursar.hardware import Accelerator, dtype_name
from bursar.roofline import unit_peak, work_seconds
from bursar.rules import MODEL_KINDS, Op, Tensor, Work
from bursar.units import format_rate, parse_count

__all__ = ["DTYPES", "FORMS", "Operation", "Priced", "PricedKernel", "make", "mfu", "parse", "price", "shrunk"]

Shape = tuple[int, ...]

DTYPES = ("fp64", "fp32", "tf32", "fp16", "bf16", "fp8")
_LARGEST = 10**12  # of one size; what a window is counted over is a list, and shorter
_LONGEST_WINDOWED = 10**7
_OTHER_DTYPE = {"fp8": ("matmul",), "tf32": ("matmul", "matvec", "einsum", "conv1d", "conv2d", "conv3d")}


@dataclass(frozen=True)
class Operation:
    """An operation as asked: what it is given and the kernels it launches, in order."""

    name: str
    shapes: tuple[Shape, ...]  # as written
    options: Mapping[str, Any]
    dtype: str
    operands: tuple[Tensor, ...] = field(repr=False)  # the tensors it is called with
    kernels: tuple[Op, ...] = field(repr=False)

    @property
    def text(self) -> str:
        """The operation as the command line takes it.

        >>> parse("matmul 2x3 @ 3×4 backward").text
        'matmul 2x3 3x4 backward'
        """
        words = [self.name]
        options = dict(self.options)
        if (equation := options.pop("equation", None)) is not None:
            words.append(f"'{equation}'")
        words += [_spell(s) for s in self.shapes]
        for name, value in options.items():
            words.append(name if value is True else f"{name}={_spell(value) if isinstance(value, tuple) else value}")
        return " ".join(words)

    @property
    def footprint_bytes(self) -> int:
        """Its operands and everything its kernels write: the memory that running it needs at most."""
        return sum(t.n_bytes for t in (*self.operands, *(t for op in self.kernels for t in op.written)))


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a form builds from: checked shapes and options."""

    name: str
    shapes: tuple[Shape, ...]
    options: Mapping[str, Any]
    dtype: str

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(k.tensor(self.dtype, *s) for s in self.shapes)

    def error(self, why: str) -> BadInput:
        form = FORMS[self.name]
        got = " ".join(_spell(s) for s in self.shapes) or "nothing"
        return BadInput(f"{self.name} {got}: {why}; it takes {form.takes}, as in '{form.example}'")


_Built = tuple[tuple[Tensor, ...], tuple[Op, ...]]  # operands, forward kernels


@dataclass(frozen=True, slots=True)
class Form:
    """How one operation is written, and what builds it."""

    example: str
    takes: str
    build: Callable[[_Asked], _Built]
    shapes: tuple[int, ...] = (1,)  # how many it may have
    options: tuple[str, ...] = ()
    shrink: Callable[[int, int], bool] = lambda shape, dim: True  # which sizes may be halved and leave its kind of work
    notes: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------------------- building


def _matmul(x: _Asked) -> _Built:
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
            f"the inner sizes do not match, {a.shape[-1]} of {_spell(a.shape)} and {b.shape[-2]} of {_spell(b.shape)}"
        )
    rows = math.prod(a.shape[:-1] if len(b.shape) == 2 else a.shape[:-2])
    if len(b.shape) == 2:  # torch folds the batch into the rows
        return (a, b), (k.matmul(Tensor((rows, a.shape[-1]), a.dtype, a.n_bytes), b),)
    flat = [Tensor((rows, *t.shape[-2:]), t.dtype, t.n_bytes) for t in (a, b)]
    return (a, b), (k.matmul(flat[0], flat[1]),)


def _matvec(x: _Asked) -> _Built:
    if len(x.shapes[0]) not in (1, 2):
        raise x.error("a matrix has two sizes; one means a square")
    rows, columns = x.shapes[0][0], x.shapes[0][-1]
    a, b = k.tensor(x.dtype, rows, columns), k.tensor(x.dtype, columns)
    return (a, b), (k.matmul(a, b),)


def _elementwise(x: _Asked) -> _Built:
    (t,) = x.tensors()
    return (t,), (k.pointwise(x.name, t),)


def _broadcast(x: _Asked) -> _Built:
    a, b = x.tensors() if len(x.shapes) == 2 else x.tensors() * 2
    shape: list[int] = []
    width = max(len(a.shape), len(b.shape))
    padded = [(1,) * (width - len(t.shape)) + t.shape for t in (a, b)]
    for m, n in zip(*padded, strict=True):
        if 1 not in (m, n) and m != n:
            raise x.error(f"{_spell(a.shape)} and {_spell(b.shape)} do not broadcast, {m} against {n}")
        shape.append(max(m, n))
    return (a, b), (k.pointwise(x.name, a, b, out=k.tensor(x.dtype, *shape)),)


def _copy(x: _Asked) -> _Built:
    (t,) = x.tensors()
    return (t,), (k.kernel("clone", [t], self=t),)


def _dropout(x: _Asked) -> _Built:
    (t,) = x.tensors()
    return (t,), (k.kernel("native_dropout", [t, k.tensor("bool", *t.shape)], input=t),)


def _reduce(x: _Asked) -> _Built:
    (t,) = x.tensors()
    name = {"max": "amax", "min": "amin", "norm": "linalg_vector_norm"}.get(x.name, x.name)
    return (t,), (k.kernel(name, [k.tensor(x.dtype)], self=t),)


def _softmax(x: _Asked) -> _Built:
    (t,) = x.tensors()
    return (t,), (k.kernel("_" + x.name, [t], self=t),)


def _layernorm(x: _Asked) -> _Built:
    (t,) = x.tensors()
    w = b = k.tensor(x.dtype, t.shape[-1])
    row = k.statistics(t, *t.shape[:-1], 1)
    return (t, w, b), (k.kernel("native_layer_norm", [t, row, row], input=t, weight=w, bias=b),)


def _rmsnorm(x: _Asked) -> _Built:
    (t,) = x.tensors()
    w = k.tensor(x.dtype, t.shape[-1])
    return (t, w), (k.kernel("_fused_rms_norm", [t, k.statistics(t, *t.shape[:-1], 1)], input=t, weight=w),)


def _cross_entropy(x: _Asked) -> _Built:
    (t,) = x.tensors()
    if len(t.shape) != 2:
        raise x.error(f"logits are tokens x vocabulary, two sizes, not {len(t.shape)}")
    target, one = k.tensor("int64", t.shape[0]), k.tensor(x.dtype)
    picked = k.kernel("nll_loss_forward", [one, one], self=t, target=target)
    return (t, target), (k.kernel("_log_softmax", [t], self=t), picked)


def _mse(x: _Asked) -> _Built:
    (t,) = x.tensors()
    return (t, t), (k.kernel("mse_loss", [k.tensor(x.dtype)], self=t, target=t),)


def _convolution(x: _Asked) -> _Built:
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
        raise x.error(f"the kernel {_spell(size)} leaves no output of {_spell(shape[2:])}")
    image = k.tensor(x.dtype, *shape)
    leading = (channels, out_channels // groups) if transposed else (out_channels, channels // groups)
    weight = k.tensor(x.dtype, *leading, *size)
    return (image, weight), (k.convolution(image, weight, k.tensor(x.dtype, shape[0], out_channels, *out), transposed),)


def _each(x: _Asked, name: str, spatial: int) -> Shape:
    value: Shape = x.options.get(name, (0,) if name == "padding" else (1,))
    if len(value) not in (1, spatial):
        raise x.error(f"{name} has one number or {spatial}, not {len(value)}")
    return value * spatial if len(value) == 1 else value


def _attention(x: _Asked) -> _Built:
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


def _einsum(x: _Asked) -> _Built:
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
            raise x.error(f"{letters!r} has {len(letters)} letters and {_spell(shape)} has {len(shape)} sizes")
        for s, n in zip(letters, shape, strict=True):
            if sizes.setdefault(s, n) != n:
                raise x.error(f"{s} is {sizes[s]} in one operand and {n} in {_spell(shape)}")
    if len(set(result)) != len(result) or not set(result) <= set(sizes):
        raise x.error(f"the letters of the result {result!r} have to be different ones of the operands")
    distinct = ["".join(dict.fromkeys(letters)) for letters in labels]  # ii is a diagonal, a view
    diagonals = [k.tensor(x.dtype, *(sizes[s] for s in letters)) for letters in distinct]
    return x.tensors(), k.einsum(f"{','.join(distinct)}->{result}", diagonals)


def _embedding(x: _Asked) -> _Built:
    if len(x.shapes[0]) != 2 or "tokens" not in x.options:
        raise x.error("a table has two sizes, and tokens=N says how many rows are looked up")
    table, indices = k.tensor(x.dtype, *x.shapes[0]), k.tensor("int64", x.options["tokens"])
    rows = k.tensor(x.dtype, x.options["tokens"], x.shapes[0][1])
    return (table, indices), (k.kernel("embedding", [rows], weight=table, indices=indices),)


# What each optimizer's fused kernel updates beside the parameters
_STATES = {
    "adamw": ("_fused_adamw_", "exp_avgs", "exp_avg_sqs"),
    "adam": ("_fused_adam_", "exp_avgs", "exp_avg_sqs"),
    "adagrad": ("_fused_adagrad_", "state_sums"),
    "momentum": ("_fused_sgd_", "momentum_buffer_list"),
}


def _optimizer(x: _Asked) -> _Built:
    if len(x.shapes[0]) != 1:
        raise x.error("one number, the parameters")
    (p,) = x.tensors()
    fused, *states = _STATES[x.name]
    args = {name: [p] for name in ("self", "grads", *states)}
    op = Op(f"aten.{fused}", args, (), writes=("self", *states), returns_new=False)
    return (p,), (op,)


_CONV_OPTIONS = ("stride", "padding", "dilation", "groups", "transposed", "no-dx")
_A_SHAPE, _ALONG = "a shape", "a shape; it runs along the last size"
_ONE_FLOP = "a function of one element counts as one FLOP, whatever the function"
_FUSED = "attention is priced as one fused kernel: the scores never reach memory"
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
       for name, space, size in (("conv1d", "x56", "x3"), ("conv2d", "x56x56", "x3x3"), ("conv3d", "x8x56x56", "x3x3x3"))},
    "attention": Form("attention 2x4x64x32 causal", "batch x heads x sequence x head size",
                      _attention, (1,), ("kv", "keys", "window", "causal"), _batch_and_sequence, (_FUSED,)),
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
    "embedding": Form("embedding 50257x768 tokens=8192", "the table and tokens=N", _embedding, (1,), ("tokens",), _rows),
    **{name: Form(f"{name} 124M", "the number of parameters", _optimizer, notes=(_STATE_DTYPE,)) for name in _STATES},
}  # fmt: skip

_FLAGS = ("causal", "transposed", "no-dx", "backward")
_COUNTS = ("kv", "keys", "window", "groups", "tokens")
_SIZED = ("window", "keys", "tokens")  # options that shrink with the shapes


# ---------------------------------------------------------------------------------------------------------- parsing


def parse(text: str, dtype: str = "bf16") -> Operation:
    """The operation that ``text`` names, in ``dtype``.

    Raises UnknownName for an operation, option or dtype that there is not, BadInput for shapes that do not fit it.

    >>> parse("matmul 16384x32768x8192").kernels[0].name
    'aten.mm'
    """
    words = _words(text)
    if not words:
        raise BadInput("no operation given; for example 'matmul 16384x32768x8192'")
    name = words[0].lower()
    if name not in FORMS:
        raise UnknownName("operation", words[0], FORMS)
    form, rest = FORMS[name], words[1:]
    options: dict[str, Any] = {}
    if name == "einsum":
        n = next((i for i, word in enumerate(rest) if word[:1].isdigit()), len(rest))
        options["equation"] = "".join(rest[:n]).replace(" ", "")
        rest = rest[n:]
    shapes: list[Shape] = []
    for word in rest:
        key, equals, value = word.partition("=")
        if equals or key in _FLAGS or (word.isidentifier() and not re.search(r"\dx|x\d", word)):
            options[key] = _option(name, key, value if equals else None)
        elif word != "@":
            shapes.append(_shape(word, form, count=name in _STATES))
    return make(name, tuple(shapes), dtype, options)


def make(name: str, shapes: tuple[Shape, ...], dtype: str, options: Mapping[str, Any]) -> Operation:
    """As `parse`, from parts: ``make("matmul", ((2, 3, 4),), "bf16", {"backward": True})``."""
    known = dtype_name(dtype)
    if known not in DTYPES:
        raise UnknownName("dtype", dtype, DTYPES)
    form = FORMS[name]
    asked = _Asked(name, shapes, options, known)
    if len(shapes) not in form.shapes:
        wanted = " or ".join(map(str, form.shapes[:2])) if len(form.shapes) < 3 else "some"
        raise asked.error(f"it has {len(shapes)} shapes and takes {wanted}")
    if name not in _OTHER_DTYPE.get(known, (name,)):
        raise BadInput(f"{name} does not run in {known}: that is for {', '.join(_OTHER_DTYPE[known])}")
    if known == "fp8" and options.get("backward"):
        raise BadInput("the backward of an fp8 product depends on its scaling recipe; ask for bf16")
    operands, made = form.build(asked)
    if options.get("backward"):
        if name in _STATES:
            raise BadInput(f"{name} has no backward: it is the optimizer's step")
        inputs_too = not options.get("no-dx")
        made = tuple(op for forward in reversed(made) for op in k.backward(forward, inputs_too=inputs_too))
    elif options.get("no-dx"):
        raise BadInput("no-dx leaves the input's gradient out of a backward: write 'backward no-dx'")
    return Operation(name, shapes, dict(options), known, operands, made)


def shrunk(operation: Operation, power: int) -> Operation:
    """``operation`` with its sizes divided by ``2**power``, none below 1; channels, heads and kernels stay."""
    form = FORMS[operation.name]
    shapes = tuple(
        tuple(max(1, n >> power) if form.shrink(i, j) else n for j, n in enumerate(shape))
        for i, shape in enumerate(operation.shapes)
    )
    if operation.name.startswith("conv"):  # space no smaller than the kernel sees
        (image, weight), (before, _) = shapes, operation.shapes
        sees = [max(operation.options.get("dilation", (1,))) * f for f in weight[1:]]
        space = (max(n, min(o, f)) for n, o, f in zip(image[2:], before[2:], sees, strict=True))
        shapes = ((*image[:2], *space), weight)
    options = {key: max(1, n >> power) if key in _SIZED else n for key, n in operation.options.items()}
    return make(operation.name, shapes, operation.dtype, options)


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        raise BadInput(f"cannot read {text!r}: a quotation mark has no partner") from None


def _shape(word: str, form: Form, *, count: bool) -> Shape:
    why = f"cannot read {word!r} as a shape: whole numbers from 1, joined by x, as in '{form.example}'"
    if count and re.fullmatch(r"[\d.]+[kMBGT]?", word):
        found: Shape = (parse_count(word),)
    elif re.fullmatch(r"\d{1,15}([xX×*]\d{1,15})*", word.replace("_", ""), re.ASCII):
        found = tuple(int(n) for n in re.split(r"[xX×*]", word.replace("_", "")))
    else:
        raise BadInput(why)
    if min(found) < 1:
        raise BadInput(f"{why}; a size of 0 is no work")
    if max(found) > _LARGEST:
        raise BadInput(f"{why}; no size above {_LARGEST:,}")
    return found


def _option(name: str, key: str, value: str | None) -> Any:
    allowed = ("backward", *FORMS[name].options)
    if key not in allowed:
        raise UnknownName(f"option of {name}", key, allowed, hint=f"For example '{FORMS[name].example}'.")
    if key in _FLAGS:
        if value is not None:
            raise BadInput(f"{key} of {name} stands alone, not {key}={value}")
        return True
    least = 0 if key == "padding" else 1
    pattern = r"\d{1,12}" if key in _COUNTS else r"\d{1,12}([x×]\d{1,12})*"
    if value is None or not re.fullmatch(pattern, value, re.ASCII):
        raise BadInput(f"{key} of {name} is a whole number from {least}, as in {key}=2, not {value!r}")
    numbers = tuple(int(n) for n in re.split(r"[x×]", value))
    if min(numbers) < least:
        raise BadInput(f"{key} of {name} is a whole number from {least}, as in {key}=2, not {value!r}")
    return numbers[0] if key in _COUNTS else numbers


def _spell(shape: Shape) -> str:
    return "x".join(map(str, shape))


# ---------------------------------------------------------------------------------------------------------- pricing


@dataclass(frozen=True, slots=True)
class PricedKernel:
    """One kernel: what it asks, and the least it takes on the device."""

    op: str
    kind: str
    work: Work
    compute_seconds: float | None = None
    memory_seconds: float | None = None

    @property
    def bound_seconds(self) -> float | None:
        """No run of this kernel on this device is shorter."""
        if self.compute_seconds is None or self.memory_seconds is None:
            return None
        return max(self.compute_seconds, self.memory_seconds)


@dataclass(frozen=True)
class Priced:
    """What an operation costs; the times are None without a device."""

    operation: Operation
    device: Accelerator | None
    kernels: tuple[PricedKernel, ...]
    peak_flops_per_s: float | None  # of the units that do it
    ridge: float | None  # FLOP/B of the device in this dtype; None where it has no peak in it
    assumptions: tuple[str, ...]

    @property
    def flops(self) -> int:
        """FLOPs the operation asks for; MFU divides these."""
        return sum(x.work.flops for x in self.kernels)

    @property
    def recompute_flops(self) -> int:
        """FLOPs done again inside a kernel: the scores, in the backward of fused attention."""
        return sum(x.work.recompute_flops for x in self.kernels)

    @property
    def full_square_flops(self) -> int:
        """`flops` by the literature's convention: attention S^2 whatever the mask."""
        return sum(x.work.full_square_flops or x.work.flops for x in self.kernels)

    @property
    def read_bytes(self) -> int:
        """Bytes read from device memory."""
        return sum(x.work.read_bytes for x in self.kernels)

    @property
    def written_bytes(self) -> int:
        """Bytes written to device memory."""
        return sum(x.work.written_bytes for x in self.kernels)

    @property
    def bytes(self) -> int:
        """Bytes moved."""
        return self.read_bytes + self.written_bytes

    @property
    def kind(self) -> str | None:
        """The kind of the kernel with the most FLOPs, or bytes where there are none; None without a kernel."""
        most = max(self.kernels, key=lambda x: (x.work.flops, x.work.read_bytes + x.work.written_bytes), default=None)
        return most.kind if most else None

    @property
    def intensity(self) -> float | None:
        """FLOPs executed, recompute included, per byte moved; None where nothing moves."""
        return (self.flops + self.recompute_flops) / self.bytes if self.bytes else None

    @property
    def compute_seconds(self) -> float | None:
        """All kernels' arithmetic at dense peak."""
        return self._sum([x.compute_seconds for x in self.kernels])

    @property
    def memory_seconds(self) -> float | None:
        """All kernels' bytes at the memory's bandwidth."""
        return self._sum([x.memory_seconds for x in self.kernels])

    @property
    def bound_seconds(self) -> float | None:
        """The sum of each kernel's bound: kernels follow one another, so they do not share what the other leaves."""
        return self._sum([x.bound_seconds for x in self.kernels])

    @property
    def bound_by(self) -> str | None:
        """``compute`` or ``memory``, whichever binds for the longer part of the bound."""
        if not self.bound_seconds:
            return None
        computing = sum(x.compute_seconds or 0.0 for x in self.kernels if x.bound_seconds == x.compute_seconds)
        return "compute" if 2 * computing >= self.bound_seconds else "memory"

    @property
    def mfu_at_bound(self) -> float | None:
        """The MFU no run can exceed; None but for products, which alone have one."""
        if self.kind not in MODEL_KINDS or not self.bound_seconds or not self.peak_flops_per_s:
            return None
        return self.flops / self.bound_seconds / self.peak_flops_per_s

    def _sum(self, seconds: list[float | None]) -> float | None:
        return None if self.device is None else sum(s for s in seconds if s is not None)


def price(operation: Operation, device: Accelerator | None = None) -> Priced:
    """What ``operation`` costs, and on ``device`` the least time it can take.

    Raises BadInput for a product in a dtype the device has no peak for.
    """
    priced = []
    for op in operation.kernels:
        found = rules.cost(op)
        if found is None:
            raise BadInput(f"{operation.text} launches {op.name}, which has no rule; add one in bursar/rules")
        kind, work = found
        seconds = (None, None) if device is None else work_seconds(work, kind, operation.dtype, device)
        priced.append(PricedKernel(op.name, kind, work, *seconds))
    made = Priced(operation, device, tuple(priced), None, None, ())
    peak = ridge = None
    if device is not None and made.kind is not None:
        peak = unit_peak(device, made.kind, operation.dtype)
        known = operation.dtype in device.peak_flops_per_s
        ridge = device.ridge(operation.dtype) if known else None
    return Priced(operation, device, tuple(priced), peak, ridge, tuple(_assumptions(made, peak)))


def mfu(flops: int, seconds: float, device: Accelerator, dtype: str) -> float:
    """``flops`` in ``seconds`` over the dense peak in ``dtype``.

    Raises BadInput where the device has no such peak, and where the share is above 1: nothing runs faster than that,
    so something other than what was asked was timed.
    """
    share = flops / seconds / device.peak(dtype)
    if share > 1:
        raise BadInput(
            f"{format_rate(flops / seconds, 'FLOP')} would be {share:.2f} of the dense {dtype} peak of {device.name}, "
            f"{format_rate(device.peak(dtype), 'FLOP')}: likely causes are fp32 run on TF32 tensor cores, a timer read "
            "before the device was done, or a device other than its name says"
        )
    return share


def _assumptions(priced: Priced, peak: float | None) -> list[str]:
    operation, device = priced.operation, priced.device
    notes = [] if operation.options.get("backward") else [*FORMS[operation.name].notes]
    if operation.options.get("backward"):
        notes.append("backward is its kernels alone: the forward before it is not in it")
        if operation.name == "attention":
            notes.append(_FUSED)
        if not operation.kernels:
            notes.append(f"the backward of {operation.name} hands the gradient on as a view: no kernel runs")
    if operation.options.get("window"):
        notes.append("a window lets a query see itself and the keys before it: it is causal")
    if operation.dtype == "fp8":
        notes.append("an fp8 product is written in bf16; its scales are not counted")
    if operation.kernels:
        notes.append("a kernel reads each distinct input once and writes each output once; caches are not modelled")
    if device is not None and peak is not None:
        notes += device.assumptions
        if priced.kind not in MODEL_KINDS and priced.flops:
            ridge = peak / device.memory_bytes_per_s
            notes.append(
                f"{priced.kind} arithmetic runs on the vector units, at the fp32 rate of {format_rate(peak, 'FLOP')}: "
                f"their ridge is {ridge:.1f} FLOP/B"
            )
    return notes
