"""What one op costs: FLOPs and bytes, as pure functions of shapes. No torch.

A rule is one function registered under the op's name. `cost` finds the rule; an op with none is not zero but unknown,
and `cost` says so by returning None. Every rule is in `RULES`; registering a name twice is an error.

Two classes of op need no rule of their own, because torch tags them: ``pointwise`` (one FLOP per output element,
whatever the function) and ``reduction`` (one FLOP per input element). Views and bare allocations are in `FREE`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

KINDS = ("matmul", "attention", "conv", "elementwise", "reduction", "embedding", "collective", "copy", "optimizer")
MODEL_KINDS = frozenset({"matmul", "attention", "conv"})  # the kinds that model and hardware FLOPs count
PHASES = ("forward", "backward", "recompute", "optimizer")
FLOATS = ("fp64", "fp32", "tf32", "fp16", "bf16", "fp8", "complex64", "complex128")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as a rule sees it. ``n_bytes`` counts each stored element once, so a broadcast view is small."""

    shape: tuple[int, ...]
    dtype: str
    n_bytes: int

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

    def moving(self, flops: int = 0, *, skip: tuple[str, ...] = (), **more: int) -> Work:
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
    work: Callable[[Op], Work]


RULES: dict[str, Rule] = {}


def rule(*names: str, kind: str) -> Callable[[Callable[[Op], Work]], Callable[[Op], Work]]:
    """Register the decorated function as the cost of the ops ``names`` (``"aten.mm"``).

    Raises ValueError for a name that already has a rule, or a kind that is none.
    """
    if kind not in KINDS:
        raise ValueError(f"no kind {kind!r}; the kinds are {', '.join(KINDS)}")

    def register(work: Callable[[Op], Work]) -> Callable[[Op], Work]:
        for name in names:
            if name in RULES:
                raise ValueError(f"{name} already has a rule, {RULES[name].work.__name__}")
            RULES[name] = Rule(kind, work)
        return work

    return register


def cost(op: Op) -> tuple[str, Work] | None:
    """The kind and work of ``op``, or None when nothing is known about it."""
    found = RULES.get(op.name)
    if found is not None:
        return found.kind, found.work(op)
    if "pointwise" in op.tags:
        return "elementwise", elementwise.pointwise(op)
    if "reduction" in op.tags:
        return "reduction", reduction.reduce(op)
    return None


from bursar.rules import attention, conv, copy, elementwise, embedding, matmul, norm, reduction  # noqa: E402  (fills RULES)
from bursar.rules.copy import FREE  # noqa: E402

__all__ = ["FREE", "KINDS", "MODEL_KINDS", "PHASES", "RULES", "Op", "Rule", "Tensor", "Work", "attention", "conv",
           "copy", "cost", "elementwise", "embedding", "matmul", "norm", "reduction", "rule"]  # fmt: skip
