"""What a kernel on this CPU takes for itself, for a trace of the CPU backend: by formula, or asked of the library.

torch's own kernels have formulas (`bursar.rules.scratch`). oneDNN chooses its kernel, and with it the scratch, when it
is called, and has no question that torch passes on; so an op of its is called once on zeros of the same shapes, and the
allocator's record of that call is read and remembered. The step is never run; a call too large to be worth it, or one
that cannot be made, keeps the formula, and the ledger's assumptions say how many of each there were.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from bursar.rules import Op
from bursar.rules import scratch as rules
from bursar.rules.scratch import Processor

HOW = ("asked", "formula", "none")
MOST_FLOPS = 2 * 10**10  # of one call that is asked: half a second of one core
MOST_BYTES = 2**28  # of its tensors
ALL_FLOPS = 4 * 10**11  # of all calls of a trace


class Answer(NamedTuple):
    """One call's record: the scratch, and the bytes of what it returned."""

    scratch_bytes: int
    output_bytes: tuple[int, ...]


_answers: dict[Any, Answer] = {}  # for the process: oneDNN answers alike each time


class Scratch:
    """The scratch of a trace's ops. ``how``: library kernels are ``asked``, by ``formula``, or nothing has any."""

    def __init__(self, how: str = "asked") -> None:
        self.how = how
        self.cpu = processor()
        self.asked: set[Any] = set()
        self.estimated: set[Any] = set()
        self._left = ALL_FLOPS
        self._known: dict[Any, tuple[int, str]] = {}

    def of(self, func: Any, key: Any, op: Callable[[], Op], flops: int, args: Any, kwargs: Any) -> tuple[int, str]:
        """Bytes that a call holds above its outputs, and what they are; ``key`` is its signature."""
        try:
            found = self._known.get(key)
        except TypeError:  # an argument that does not hash
            return self._find(func, None, op(), flops, args, kwargs)
        if found is None:
            found = self._known[key] = self._find(func, key, op(), flops, args, kwargs)
        return found

    def _find(self, func: Any, key: Any, op: Op, flops: int, args: Any, kwargs: Any) -> tuple[int, str]:
        library = rules.library_of(op)
        if library and key is not None:
            answer = self._ask(func, key, flops, args, kwargs)
            if answer is not None:
                return answer.scratch_bytes, library
        copied = sum(
            args[i].numel() * args[i].element_size()
            for i in rules.CONTIGUOUS.get(op.name, ())
            if not args[i].is_contiguous()
        )
        if op.name == _ATTENTION_BACKWARD and not args[0].transpose(1, 2).is_contiguous():
            copied += args[0].numel() * args[0].element_size()  # it takes the heads inside the sequence
        return rules.scratch_bytes(op, self.cpu) + copied, library or "the kernel's scratch"

    def _ask(self, func: Any, key: Any, flops: int, args: Any, kwargs: Any) -> Answer | None:
        key = (func, self.cpu.threads, *key[1:])
        found = _answers.get(key)
        if found is None and self.how == "asked" and flops <= min(MOST_FLOPS, self._left):
            self._left -= flops
            found = record(func, args, kwargs)
            if found is not None:
                _answers[key] = found
        if self.how != "asked":
            found = None
        (self.estimated if found is None else self.asked).add(key)
        return found

    def as_real(self, func: Any, name: str, key: Callable[[], Any], args: Any, kwargs: Any, out: Any) -> Any:
        """``out`` with the storage that the CPU's kernel gives it, where torch's fake has another."""
        if name == "aten.mkldnn_rnn_layer":
            x, hidden, hx = args[0], args[10], args[5]
            answer = self._ask(func, key(), 2 * (x.numel() // x.shape[-1]) * 4 * hidden * (x.shape[-1] + hidden),
                               args, kwargs)  # fmt: skip
            steps = x.numel() // x.shape[-1] // hx.shape[-2]
            n = answer.output_bytes[3] if answer is not None else rules.lstm_workspace(
                steps, hx.shape[-2], x.shape[-1], hidden, x.element_size()
            )  # fmt: skip
            return (*out[:3], torch.empty(n, dtype=torch.uint8, device="cpu"))
        named = (kwargs or {}).get("reduction", args[_REDUCTION[name]] if len(args) > _REDUCTION[name] else 1)
        if not named:
            return out
        # The scalar is made by shrinking the tensor of each element's loss: Loss.cpp, resize_
        n = math.prod(torch.broadcast_shapes(args[0].shape, args[1].shape))
        return torch.empty(n, dtype=out.dtype, device="cpu").as_strided((), ()) if n else out

    @property
    def assumptions(self) -> list[str]:
        """What the ledger says about it."""
        if self.how == "none":
            return ["no kernel's own scratch is counted: where a library takes some, the peak is too low"]
        found = []
        if self.asked:
            found.append(f"scratch of oneDNN's kernels: {len(self.asked)} signatures called once each on this CPU "
                         f"({self.cpu.threads} threads)")  # fmt: skip
        if self.estimated:
            found.append(f"scratch of oneDNN's kernels: {len(self.estimated)} signatures by formula, which follows "
                         f"this CPU ({self.cpu.isa}, {self.cpu.threads} threads) and is an estimate")  # fmt: skip
        return found


_REDUCTION = {"aten.mse_loss": 2, "aten.smooth_l1_loss": 2, "aten.binary_cross_entropy": 3}
_ATTENTION_BACKWARD = "aten._scaled_dot_product_flash_attention_for_cpu_backward"
AS_REAL = frozenset({"aten.mkldnn_rnn_layer", *_REDUCTION})


@functools.cache
def _isa() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512"):
        return "amx" if torch.cpu._is_amx_tile_supported() else "avx512"
    return "avx2" if capability == "AVX2" else "other"


def processor() -> Processor:
    """This CPU, with the threads torch uses now."""
    return Processor(torch.get_num_threads(), _isa())


def record(func: Any, args: Any, kwargs: Any) -> Answer | None:
    """Call ``func`` once on zeros like ``args``; None where that would take too much, or cannot be.

    The record is the legacy profiler's: it costs microseconds, prints nothing, and refuses where another one is on.
    """
    from torch._C._autograd import _disable_profiler_legacy, _enable_profiler_legacy
    from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig

    spans = [*_spans(args), *_spans(tuple((kwargs or {}).values()))]
    if sum(spans) > MOST_BYTES or 0 in spans:  # a workspace that is not there would be written to
        return None
    with _disable_current_modes():  # gradients on or off as in the step: an LSTM makes its workspace by it
        real, named = _zeros(args), {k: _zeros(v) for k, v in (kwargs or {}).items()}
        try:
            config = ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig())
            _enable_profiler_legacy(config)
        except (RuntimeError, ImportError, TypeError):
            return None
        out: Any = None
        try:
            out = func(*real, **named)
        except RuntimeError:  # not for zeros, or not in one go: the formula stays
            return None
        finally:
            events = _disable_profiler_legacy()
        changes = [e.cpu_memory_usage() for thread in events for e in thread if str(e.kind()) == "memory_alloc"]
        outputs = out if isinstance(out, (list, tuple)) else (out,)
        made = tuple(o.untyped_storage().nbytes() if isinstance(o, torch.Tensor) else 0 for o in outputs)
    live = most = 0
    for change in changes:
        live += change
        most = max(most, live)
    return Answer(most - live, made)


def _zeros(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        new = torch.zeros(_span(value), dtype=value.dtype, device="cpu")
        return new.as_strided(value.shape, value.stride())
    if isinstance(value, (list, tuple)):
        return type(value)(_zeros(v) for v in value)
    return value


def _span(x: torch.Tensor) -> int:
    """Elements from the first to the last of ``x``."""
    return 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


def _spans(values: Any) -> list[int]:
    found = []
    for v in values:
        if isinstance(v, torch.Tensor):
            found.append(_span(v) * v.element_size())
        elif isinstance(v, (list, tuple)):
            found += _spans(v)
    return found
