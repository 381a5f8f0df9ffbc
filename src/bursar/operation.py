"""One operation, named and priced: ``price(parse("matmul 16384x32768x8192"), accelerator("h100-sxm"))``. No torch.

The language is a name, shapes and options; every form is a row of `FORMS`, with an example. `parse` turns the text
into `kernels`, `rules` counts each, `roofline` bounds each on a device; nothing is counted here.

    matmul 16384x32768x8192                       (B, D) @ (D, K); 8x512x64x512 has a batch in front
    matmul 16384x32768 @ 32768x8192               the same, both shapes written out
    conv2d 8x3x224x224 64x7x7 stride=2 padding=3  input NxCxHxW, then output channels x kernel
    attention 2x4x64x32 causal                    batch x heads x sequence x head size
    einsum 'bij,bjk->bik' 2x3x4 2x4x5
    gelu 4096x4096 backward                       `backward` after an operation: its backward kernels alone
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bursar import kernels as k
from bursar import rules
from bursar.errors import BadInput, NoAnswer, UnknownName
from bursar.forms import FORMS, FUSED, STATES, Asked, Form, Shape, spell
from bursar.hardware import Accelerator, dtype_name
from bursar.roofline import unit_peak, work_seconds
from bursar.rules import MODEL_KINDS, Op, Tensor, Work
from bursar.units import format_rate, parse_count

__all__ = [
    "DTYPES",
    "FORMS",
    "Measured",
    "Operation",
    "Priced",
    "PricedKernel",
    "join",
    "make",
    "mfu",
    "parse",
    "price",
    "shrunk",
]

DTYPES = ("fp64", "fp32", "tf32", "fp16", "bf16", "fp8")
_LARGEST = 10**12  # of one size
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
        words += [spell(s) for s in self.shapes]
        for name, value in options.items():
            words.append(name if value is True else f"{name}={spell(value) if isinstance(value, tuple) else value}")
        return " ".join(words)

    @property
    def footprint_bytes(self) -> int:
        """Its operands and everything its kernels write: the memory that running it needs at most."""
        return sum(t.n_bytes for t in (*self.operands, *(t for op in self.kernels for t in op.written)))


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
            shapes.append(_shape(word, form, count=name in STATES))
    return make(name, tuple(shapes), dtype, options)


def make(name: str, shapes: tuple[Shape, ...], dtype: str, options: Mapping[str, Any]) -> Operation:
    """As `parse`, from parts: ``make("matmul", ((2, 3, 4),), "bf16", {"backward": True})``."""
    known = dtype_name(dtype)
    if known not in DTYPES:
        raise UnknownName("dtype", dtype, DTYPES)
    form = FORMS[name]
    asked = Asked(name, shapes, options, known)
    if len(shapes) not in form.shapes:
        wanted = " or ".join(map(str, form.shapes[:2])) if len(form.shapes) < 3 else "some"
        raise asked.error(f"it has {len(shapes)} shapes and takes {wanted}")
    if name not in _OTHER_DTYPE.get(known, (name,)):
        raise BadInput(f"{name} does not run in {known}: that is for {', '.join(_OTHER_DTYPE[known])}")
    if known == "fp8" and options.get("backward"):
        raise BadInput("the backward of an fp8 product depends on its scaling recipe; ask for bf16")
    operands, made = form.build(asked)
    if options.get("backward"):
        if name in STATES:
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


def join(text: str, words: Sequence[str]) -> str:
    """One operation from the words of a command line, whose shell has taken the quotation marks.

    >>> join("relu", ("4x4", "backward"))
    'relu 4x4 backward'
    """
    return " ".join((text, *words))


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


@dataclass(frozen=True, slots=True)
class Measured:
    """One operation in one dtype, timed. Counts are those of `operation`, which may be smaller than what was asked."""

    operation: Operation
    device: str  # the driver's name of the GPU, or "cpu"
    flops: int
    bytes: int
    seconds: float  # median
    iqr_seconds: float
    cpu_seconds: float  # median; all threads together, of the host
    repeats: int
    threads: int  # torch's
    cpus: int  # this process may run on
    shrunk_by: int  # sizes were divided by 2 to this power
    canary_flops_per_s: tuple[float, float]  # a small fp32 product before and after
    mfu: float | None
    mfu_note: str  # against which peak, or why there is none
    notes: tuple[str, ...] = field(default=())

    @property
    def flops_per_s(self) -> float:
        """FLOP/s reached."""
        return self.flops / self.seconds

    @property
    def bytes_per_s(self) -> float:
        """Bytes moved per second, by the count: a cache may have spared the memory some of them."""
        return self.bytes / self.seconds

    def speed_up(self, other: Measured) -> float:
        """How many times the FLOP/s of ``other``; its bytes/s where there are no FLOPs."""
        return self.flops_per_s / other.flops_per_s if other.flops else self.bytes_per_s / other.bytes_per_s


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

    Raises BadInput where the device has no such peak, NoAnswer where the share is above 1: nothing runs faster than
    that, so something other than what was asked was timed.
    """
    share = flops / seconds / device.peak(dtype)
    if share > 1:
        raise NoAnswer(
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
            notes.append(FUSED)
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
