"""What an op's place in a step adds to it, and what it costs to call it at all.

Each is the time of a tiny op in its place (a chain that autograd records, its backward, an optimizer's loop, the inside
of a C++ composite) less that of the same op in `single.Bench`. In a real step the code around an op is cold, for every
op of any size sweeps the core's cache: what that adds is taken from a reference step, as what its ops run by themselves
leave unexplained of each phase, per op after such a sweep.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bursar.bench import clock
from bursar.bench.grids import call, operand, state
from bursar.bench.single import Bench
from bursar.calibration import Calibration
from bursar.context import HOT, placed, signature
from bursar.pricing import Curves
from bursar.workload.step import step

_CHAIN = 64


def measure(bench: Bench, repeats: int = 15) -> dict[str, float]:
    """Seconds by place, all code hot: floor, call, module, view, inner, backward, optimizer."""
    tiny = operand(8)
    adding = call("mul.Tensor", tiny, tiny, out=(tiny._replace(storage=-1),))
    alone = bench.seconds(adding, state(adding, HOT)) or 0.0
    found = {"floor": alone}
    x, w = torch.ones(8, requires_grad=True), torch.ones(8)

    def chain() -> torch.Tensor:
        y = x
        for _ in range(_CHAIN):
            y = y * w
        return y

    per_call = clock.median(chain, budget=0.01)[0] / _CHAIN
    found["call"] = per_call - alone
    scaled = _Scaled()

    def modules() -> torch.Tensor:
        y = x
        for _ in range(_CHAIN):
            y = scaled(y)
        return y

    found["module"] = max(0.0, clock.median(modules, budget=0.01)[0] / _CHAIN - per_call)
    flat = torch.ones(2, 4, requires_grad=True)

    def views() -> None:
        for _ in range(_CHAIN):
            flat.view(8)

    found["view"] = clock.median(views, budget=0.005)[0] / _CHAIN
    backward = []
    for _ in range(repeats):
        y = chain().sum()
        began = time.perf_counter()
        y.backward()
        backward.append((time.perf_counter() - began) / _CHAIN)
    found["backward"] = statistics.median(backward) - alone
    found["inner"] = _composite() - alone
    found["optimizer"] = _optimizer(repeats) - alone
    return found


class Reference(nn.Module):
    """The step whose unexplained seconds are the cold code's: tables, norms, a gate, a softmax, views, residuals.

    No product, for what they take would drown what is looked for.
    """

    def __init__(self, rows: int, width: int, layers: int) -> None:
        super().__init__()
        self.tables = nn.ParameterList(torch.ones(rows, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.gates = nn.ModuleList(nn.Sequential(nn.Tanh(), nn.Softplus()) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Its work."""
        for table, norm, gate in zip(self.tables, self.norms, self.gates, strict=True):
            y = norm(x * table)
            y = torch.softmax(gate(y), -1)
            x = x + y.view(len(y), 4, -1).transpose(0, 1).reshape(y.shape)
        return x.square().mean()


def cold(bench: Bench, half: Calibration, rows: int, width: int, layers: int, repeats: int) -> dict[str, float]:
    """``forward_cold``, ``backward_cold``, ``optimizer_cold``: seconds an op has more after a sweep of the cache."""
    module, batch = Reference(rows, width, layers), torch.linspace(-1, 1, rows * width).view(rows, width)
    ledger = step(Reference(rows, width, layers), batch, on="cpu", fold=False)
    known: dict[str, float] = {}
    places = placed(ledger, half.machine.cache_bytes)
    before = _phases(module, batch, repeats)
    for place in places:
        key = signature(place.call, place.state)
        if key not in known:
            known[key] = bench.seconds(place.call, place.state) or 0.0
    after = _phases(module, batch, repeats)
    took = {phase: min(before[phase], after[phase]) for phase in before}  # what disturbs only ever adds
    curves = Curves(half)
    found = {}
    for phase in took:
        mine = [p for p in places if p.phase == phase]
        swept = math.fsum(p.stream for p in mine)
        explained = math.fsum(known[signature(p.call, p.state)] + curves.around(p) for p in mine)
        found[f"{phase}_cold"] = max(0.0, (took[phase] - explained) / max(swept, 1.0))
    return found


def _phases(module: nn.Module, batch: torch.Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of forward, backward and optimizer of a step of ``module``."""
    optimizer = torch.optim.AdamW(module.parameters(), foreach=False)
    now = clock.long_clock()
    times: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}
    for _ in range(repeats + 2):
        marks = [now()]
        loss = module(batch)
        marks.append(now())
        loss.backward()
        marks.append(now())
        optimizer.step()
        optimizer.zero_grad()
        marks.append(now())
        for i, phase in enumerate(times):
            times[phase].append(marks[i + 1] - marks[i])
    return {phase: statistics.median(found[2:]) for phase, found in times.items()}


class _Scaled(nn.Module):
    """One op behind a module's call."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Its work."""
        return x * self.w


class _Count(TorchDispatchMode):
    """How many ops run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        return func(*args, **(kwargs or {}))


def _composite() -> float:
    """Seconds an op within a C++ composite: an unrolled GRU's, all of them tiny."""
    cell, x = nn.GRU(4, 4), torch.randn(32, 1, 4)
    with _Count() as count:
        cell(x)
    return clock.median(lambda: cell(x), budget=0.01)[0] / float(max(1, count.ops))


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
    return found / float(max(1, count.ops))
