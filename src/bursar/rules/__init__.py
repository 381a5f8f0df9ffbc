"""What one op costs: FLOPs and bytes, as pure functions of shapes. No torch.

A rule is one function registered under the op's name. `cost` finds the rule; an op with none is not zero but unknown,
and `cost` says so by returning None. Every rule is in `RULES`; registering a name twice is an error.

Two classes of op need no rule of their own, because torch tags them: ``pointwise`` (one FLOP per output element,
whatever the function) and ``reduction`` (one FLOP per input element). Views and bare allocations are in `FREE`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

KINDS = ("matmul", "attention", "conv", "elementwise", "reduction", "embedding", "collective", "copy", "optimizer")
MODEL_KINDS = frozenset({"matmul", "attention", "conv"})  # the kinds that model and hardware FLOPs count
PHASES = ("forward", "backward", "recompute", "optimizer")
FLOATS = ("fp64", "fp32", "tf32", "fp16", "bf16", "fp8", "complex64", "complex128")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as a rule sees it. ``n_bytes`` counts each stored element once, so a broadcast view is small.

    ``stored`` is the number of elements that a sparse tensor holds, None for a dense one; ``n_bytes`` of a sparse
    tensor are those of its values and indices.
    """

    shape: tuple[int, ...]
    dtype: str
    n_bytes: int
    stored: int | None = None

    @property
    def numel(self) -> int:
        """The number of elements, repeated ones included."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether arithmetic on it is floating-point arithmetic."""
        return self.dtype in FLOATS


@dataclass(frozen=True, slots=True)
class Work:
    """What one op asks of one accelerator. Exact counts, so tests may use ``==``."""

    flops: int = 0  # multiply and add counted apart: one FMA is 2
    read_bytes: int = 0  # from device memory, each distinct input once
    written_bytes: int = 0
    recompute_flops: int = 0  # done again inside the kernel: flash attention's second QK^T in backward
    full_square_flops: int = 0  # the literature's count, where a mask makes it differ
    assumes: str = ""  # what the count takes for granted; the ledger's assumptions carry it to the page


@dataclass(frozen=True)
class Op:
    """One call of one op: its arguments by schema name (tensors as `Tensor`, or lists of them) and its outputs."""

    name: str
    args: Mapping[str, Any]
    outputs: tuple[Tensor, ...]
    tags: frozenset[str] = field(default_factory=frozenset)
    writes: tuple[str, ...] = ()  # names of arguments written in place
    returns_new: bool = True  # False when what is returned is one of the written arguments

    def __getitem__(self, name: str) -> Any:
        """The argument called ``name`` in the op's schema; None where it was left out."""
        return self.args.get(name)

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        """All tensors among the arguments, in order, lists flattened."""
        found: list[Tensor] = []
        for value in self.args.values():
            found += _tensors(value)
        return tuple(found)

    @property
    def output(self) -> Tensor:
        """The first output; for an op in place, what it writes."""
        return self.outputs[0] if self.outputs else self.written[0]

    @cached_property
    def written(self) -> tuple[Tensor, ...]:
        """The tensors written: those returned new and the arguments changed in place."""
        found = list(self.outputs) if self.returns_new else []
        for name in self.writes:
            found += _tensors(self.args.get(name))
        return tuple(found)

    def moving(self, flops: int = 0, *, skip: tuple[str, ...] = (), **more: Any) -> Work:
        """``flops`` with the bytes of a plain kernel: every input once but those in ``skip``, every output once.

        An ``out=`` tensor is an output, whatever stood in it.
        """
        skip = (*skip, *(name for name in self.writes if name.startswith("out")))
        read = sum(t.n_bytes for name, value in self.args.items() if name not in skip for t in _tensors(value))
        return Work(flops, read, sum(t.n_bytes for t in self.written), **more)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v)]
    return []


@dataclass(frozen=True, slots=True)
class Rule:
    """A registered cost function and the kind of its op."""

    kind: str
    work: Callable[[Op], Work | int]


RULES: dict[str, Rule] = {}


_Cost = TypeVar("_Cost", bound=Callable[[Op], Work | int])


def rule(*names: str, kind: str) -> Callable[[_Cost], _Cost]:
    """Register the decorated function as the cost of the ops ``names`` (``"mylib::op"``, or as pages print it
    ``"mylib.op"``). It gets the `Op` and returns its FLOPs, or a `Work` where its bytes are not each input and output
    once.

    Raises ValueError for a name that is no ``library::op`` or already has a rule, or a kind that is none.
    """
    if kind not in KINDS:
        raise ValueError(f"no kind {kind!r}; the kinds are {', '.join(KINDS)}")
    dotted = [name.removeprefix("torch.ops.").replace("::", ".") for name in names]
    for name in dotted:
        if name.count(".") != 1 or not all(name.split(".")):
            raise ValueError(f"{name!r} is no op's name; write library::op, without the overload, as in 'mylib::my_op'")
        if name in RULES:
            raise ValueError(f"{name} already has a rule, {RULES[name].work.__name__}")

    def register(work: _Cost) -> _Cost:
        for name in dotted:
            RULES[name] = Rule(kind, work)
        return work

    return register


def three_lines(name: str) -> str:
    """The Python that gives the op ``name`` a rule, for pages and errors to print.

    >>> print(three_lines("mylib.twice"))
    @bursar.rule("mylib::twice", kind="elementwise")
    def twice(op):
        return op.output.numel  # FLOPs; arguments by name: op["x"].shape
    """
    library, _, base = name.partition(".")
    function = base if base.isidentifier() else "work"
    return (f'@bursar.rule("{library}::{base}", kind="elementwise")\ndef {function}(op):\n'
            '    return op.output.numel  # FLOPs; arguments by name: op["x"].shape')  # fmt: skip


def find(name: str) -> Rule | None:
    """The rule of an op; one in place has that of its twin where it has none of its own."""
    return RULES.get(name) or (RULES.get(name[:-1]) if name.endswith("_") else None)


def cost(op: Op) -> tuple[str, Work] | None:
    """The kind and work of ``op``, or None when nothing is known about it.

    A product of complex numbers is 8 FLOPs per multiply-add, four times a real one's 2.
    """
    found = find(op.name)
    if found is not None:
        work = found.work(op)
        if not isinstance(work, Work):
            work = op.moving(operator.index(work))
        if found.kind in MODEL_KINDS and work.flops and any(t.dtype.startswith("complex") for t in op.inputs):
            work = replace(work, flops=4 * work.flops)
        return found.kind, work
    if "pointwise" in op.tags:
        return "elementwise", elementwise.pointwise(op)
    if "reduction" in op.tags:
        return "reduction", reduction.reduce(op)
    return None


from bursar.rules import (  # noqa: E402  # noqa: E402  (the imports fill RULES)
    attention,
    conv,
    copy,
    elementwise,
    embedding,
    fft,
    linalg,
    matmul,
    norm,
    recurrent,
    reduction,
    sampling,
    sparse,
)
from bursar.rules.copy import FREE  # noqa: E402

__all__ = ["FREE", "KINDS", "MODEL_KINDS", "PHASES", "RULES", "Op", "Rule", "Tensor", "Work", "attention", "conv",
           "copy", "cost", "elementwise", "embedding", "fft", "find", "linalg", "matmul", "norm", "recurrent",
           "reduction", "rule", "sampling", "sparse", "three_lines"]  # fmt: skip
