"""What an op's place in a step adds to it, and what it costs to call it at all.

Each is the time of a tiny op in its place (a chain that autograd records, its backward, an optimizer's loop, the inside
of a C++ composite) less that of the same op in `single.Bench`. ``_cold`` is the same after a pass over memory that swept
the code from the core's cache, as most ops of a real step find it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bursar.bench import clock
from bursar.bench.grids import call, operand, state
from bursar.bench.single import EVICT_BYTES, Bench
from bursar.context import COLD, HOT

_CHAIN = 64


def measure(bench: Bench, repeats: int = 15) -> dict[str, float]:
    """Seconds by place: floor, call, module, view, inner, backward, optimizer, and what is colder."""
    tiny = operand(8)
    adding = call("mul.Tensor", tiny, tiny, out=(tiny._replace(storage=-1),))
    alone = {level: bench.seconds(adding, state(adding, level)) or 0.0 for level in (HOT, COLD)}
    found = {"floor": alone[HOT]}
    sweep = torch.zeros(EVICT_BYTES // 4)
    x, w = torch.ones(8, requires_grad=True), torch.ones(8)

    def chain() -> torch.Tensor:
        y = x
        for _ in range(_CHAIN):
            y = y * w
        return y

    per_call, _ = clock.median(chain, budget=0.01)
    found["call"] = per_call / _CHAIN - alone[HOT]
    found["call_cold"] = _after(lambda: sweep.add_(1.0), lambda: x * w, repeats) - alone[COLD]

    scaled = _Scaled()

    def modules() -> torch.Tensor:
        y = x
        for _ in range(_CHAIN):
            y = scaled(y)
        return y

    found["module"] = clock.median(modules, budget=0.01)[0] / _CHAIN - per_call / _CHAIN
    found["module_cold"] = (
        _after(lambda: sweep.add_(1.0), lambda: scaled(x), repeats) - alone[COLD] - found["call_cold"]
    )
    flat = torch.ones(2, 4, requires_grad=True)

    def views() -> None:
        for _ in range(_CHAIN):
            flat.view(8)

    found["view"] = clock.median(views, budget=0.005)[0] / _CHAIN
    found["view_cold"] = (
        _after(lambda: sweep.add_(1.0), lambda: flat.view(8) * w, repeats) - alone[COLD] - found["call_cold"]
    )

    backward = []
    for _ in range(repeats):
        y = chain().sum()
        began = time.perf_counter()
        y.backward()
        backward.append((time.perf_counter() - began) / _CHAIN)
    found["backward"] = statistics.median(backward) - alone[HOT]
    found["backward_cold"] = _cold_node(sweep, x, w, repeats) - alone[COLD]
    found["inner"] = _composite() - alone[HOT]
    found["optimizer"] = _optimizer(repeats) - alone[HOT]
    for name in ("call", "module", "backward", "view"):
        found[f"{name}_cold"] = max(found[f"{name}_cold"], found[name])
    return found


class _Scaled(nn.Module):
    """One op behind a module's call."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.w


def _after(before: Callable[[], Any], run: Callable[[], Any], repeats: int) -> float:
    return clock.median(run, before=before, fewest=repeats, budget=0.0)[0]


def _cold_node(sweep: torch.Tensor, x: torch.Tensor, w: torch.Tensor, repeats: int) -> float:
    """Seconds of one node in the engine, from the hook ahead of it to the hook ahead of the next, after a sweep."""
    marks: list[float] = []

    def ahead(_: Any) -> None:
        marks.append(time.perf_counter())
        sweep.add_(1.0)
        marks.append(time.perf_counter())

    y = x
    for _ in range(repeats + 1):
        y = y * w
        assert y.grad_fn is not None
        y.grad_fn.register_prehook(ahead)
    y.sum().backward()
    return statistics.median(marks[i + 1] - marks[i] for i in range(1, len(marks) - 1, 2))


class _Count(TorchDispatchMode):
    """How many ops run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        return func(*args, **(kwargs or {}))


def _composite() -> float:
    """Seconds an op within a C++ composite: an unrolled GRU's, all of them tiny."""
    cell, x = nn.GRU(4, 4), torch.randn(32, 1, 4)
    with _Count() as count:
        cell(x)
    return clock.median(lambda: cell(x), budget=0.01)[0] / max(1, count.ops)


def _optimizer(repeats: int) -> float:
    """Seconds an op of AdamW's loop over parameters of 8 elements."""
    parameters = [nn.Parameter(torch.ones(8)) for _ in range(24)]
    optimizer = torch.optim.AdamW(parameters, foreach=False)
    for p in parameters:
        p.grad = torch.ones(8)
    optimizer.step()
    with _Count() as count:
        optimizer.step()
    found = clock.median(optimizer.step, fewest=repeats, budget=0.0)[0]
    return found / max(1, count.ops)
