"""A step's seconds on this machine, from what was measured of it. No torch.

An op takes what it took when it was benchmarked by itself, in the state a step leaves its operands in; where that was
not done, what the curves say: products by their three sizes and layout, attention by its length, convolution as the
product it amounts to, other ops by name and elements, the rest by bytes. Its place in the step adds to it: the call in
Python, autograd's engine, the module around it, all of them slower after a stream that swept their code from cache.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bursar import store
from bursar.calibration import Calibration, Point
from bursar.context import Placed, arguments, n_bytes, placed, signature
from bursar.errors import BadInput
from bursar.hardware import Accelerator, Cluster
from bursar.ledger import Call, Ledger, Operand, Row
from bursar.machine import Machine
from bursar.reconcile import Expected
from bursar.roofline import Forecast, forecast
from bursar.rules import FLOATS

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_FLOATS = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}
_Z80 = 1.2816  # of a normal distribution, 80 % lie within this many deviations
# The spread of measured over forecast, before this machine has any: from `benchmarks/balance_time.md` and published
# work (10 to 35 % without measurements of the ops), and how many steps it counts for.
PRIOR = {True: 0.10, False: 0.25}
PRIOR_STEPS = 4


@dataclass(frozen=True)
class Priced:
    """A step priced op by op."""

    seconds: tuple[float, ...]  # of each recorded row, its place in the step included
    forecast: Forecast
    benchmarked: float  # the share of the seconds that comes from ops benchmarked by themselves
    clock: str = "wall"  # that the seconds are of

    @property
    def expected(self) -> Expected:
        """What `reconcile` lays beside a measurement."""
        ahead = self.forecast
        return Expected(ahead.seconds, self.seconds, ahead.upper_seconds, self.clock, ahead.ideal_seconds["hardware"],
                        self.benchmarked)  # fmt: skip


def local(ledger: Ledger, here: Machine, remembered: Mapping[str, float] | None = None) -> Priced:
    """``ledger``'s step by the calibration kept for the machine ``here``, and by what was benchmarked under it.

    Raises NotCalibrated where there is none that holds.
    """
    calibration = store.load(here)
    known = store.remembered(calibration) if remembered is None else remembered
    if ledger.device != "cpu":  # a GPU's ops, priced at the peaks measured here until its ops are benchmarked too
        return Priced((), forecast(ledger, Cluster(device(calibration))), 0.0)
    return price(ledger, calibration, known, store.past(calibration))


def device(calibration: Calibration) -> Accelerator:
    """This machine as a row of the catalogue would say it: the peak of a dtype is the best product measured."""
    machine = calibration.machine
    rates = {d: rate for d in calibration.matmul if (rate := calibration.best(d)) is not None}
    # What has no units of its own is computed in fp32's: a dtype that was not measured has fp32's rate, at most
    rates = {**{d: rates["fp32"] for d in FLOATS if "fp32" in rates}, **rates}
    source = f"measured by bursar bench, {calibration.date}"
    return Accelerator(
        name="local",
        title=f"this machine ({machine.device or machine.cpu}, {machine.threads} threads)",
        vendor="",
        year=int(calibration.date[:4]),
        peak_flops_per_s=rates,
        memory_bytes=machine.memory_bytes,
        memory_bytes_per_s=calibration.memory_bytes_per_s,
        sources={"peak_flops_per_s": f"the best product, {source}", "memory_bytes_per_s": f"a copy, {source}"},
        usable_memory_bytes=machine.memory_bytes,
    )


def price(
    ledger: Ledger,
    calibration: Calibration,
    remembered: Mapping[str, float] | None = None,
    past: Sequence[Mapping[str, Any]] = (),
) -> Priced:
    """``ledger``'s step on the machine of ``calibration``, with the ops in ``remembered`` and the errors in ``past``.

    Raises BadInput for a ledger that does not say how its ops were called.
    """
    if not ledger.calls or len(ledger.calls) != len(ledger):
        raise BadInput(
            "this ledger does not say how each op was called; trace with on='local', or on='cpu', fold=False"
        )
    curves = Curves(calibration)
    known = remembered or {}
    seconds: list[float] = []
    measured = overhead = 0.0
    bound = {"compute": 0.0, "memory": 0.0, "network": 0.0}
    local = device(calibration)
    places = placed(ledger, calibration.machine.cache_bytes)
    for row, place in zip(ledger.recorded, places, strict=True):
        alone = known.get(signature(place.call, place.state))
        if alone is not None:
            measured += alone
        else:
            alone = curves.seconds(row, place)
        around = curves.around(place)
        floor = curves.floor
        busy = max(0.0, alone - floor)
        bound["compute" if row.work.flops * local.memory_bytes_per_s
              > (row.work.read_bytes + row.work.written_bytes) * local.peak_flops_per_s.get(row.dtype, math.inf)
              else "memory"] += busy  # fmt: skip
        overhead += alone + around - busy
        seconds.append(max(0.0, alone + around))
    total = math.fsum(seconds)
    spread, learnt = interval(past, bool(remembered))
    plain = forecast(ledger, Cluster(local))
    notes = [n for n in plain.assumptions if not n.startswith("time is ")]
    notes += [
        f"time is the sum over ops, calibrated {calibration.date} with {calibration.machine.threads} threads: "
        f"{measured / total:.0%} of it from ops benchmarked alone" if total else "no op, no time",
        f"80 % interval: x/÷ {math.exp(_Z80 * spread):.2f}, from "
        + (f"{learnt} past steps measured here and a prior of {PRIOR_STEPS}" if learnt else "a prior: no step was "
           "measured here yet (--measure does)"),
        "MFU is against the best product measured here in the dtype, for nobody publishes this machine's peak",
    ]  # fmt: skip
    if calibration.busy:
        notes.append(f"the calibration is doubtful: {calibration.busy}")
    made = dataclasses.replace(
        plain,
        seconds=total,
        lower_seconds=total * math.exp(-_Z80 * spread),
        upper_seconds=total * math.exp(_Z80 * spread),
        bound_by={**bound, "overhead": total - sum(bound.values())},
        assumptions=tuple(notes),
        basis="calibrated",
        row_seconds=tuple(seconds),
    )
    return Priced(tuple(seconds), made, measured / total if total else 0.0, calibration.clock)


def interval(past: Sequence[Mapping[str, Any]], benchmarked: bool) -> tuple[float, int]:
    """The deviation of log(measured / forecast), and how many past steps it was learnt from.

    The mean square of past errors, the prior counting as `PRIOR_STEPS` of them; about zero, so that a bias widens it.

    >>> interval([], True)
    (0.1, 0)
    """
    errors = [math.log(p["measured"] / p["forecast"]) for p in past if p.get("benchmarked") == benchmarked]
    square = PRIOR_STEPS * PRIOR[benchmarked] ** 2 + math.fsum(e * e for e in errors)
    return math.sqrt(square / (PRIOR_STEPS + len(errors))), len(errors)


def wanted(ledger: Ledger, calibration: Calibration, remembered: Mapping[str, float]) -> list[Placed]:
    """The calls that nobody has benchmarked, each once, those with most seconds by the curves first."""
    curves = Curves(calibration)
    found: dict[str, tuple[float, Placed]] = {}
    for row, place in zip(ledger.recorded, placed(ledger, calibration.machine.cache_bytes), strict=True):
        key = signature(place.call, place.state)
        if key not in remembered:
            before = found.get(key, (0.0, place))[0]
            found[key] = before + curves.seconds(row, place), place
    return [place for _, place in sorted(found.values(), key=lambda entry: -entry[0])]


class Curves:
    """The calibration's points, made ready to be read between."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        over = calibration.overhead
        self.floor = over["floor"]
        self._over = over

    # ---- an op alone

    def seconds(self, row: Row, place: Placed) -> float:
        """Of one op by itself, its call included."""
        call = place.call
        name = call.op.split(".")[1] if "." in call.op else call.op
        tensors = arguments(call)
        moved = sum(map(n_bytes, (*tensors, *call.outputs)))
        if not row.work.flops and not row.work.read_bytes and not row.work.written_bytes:
            return self.floor
        named = self._named(row, call, name, place.cold)
        if name in PRODUCTS and row.work.flops:
            found = self._product(row.dtype, *product_sizes(name, tensors))
        elif name.startswith("convolution") and row.work.flops:
            found = self._convolution(row, call, name)
        elif row.kind == "attention" and row.work.flops:
            found = self._attention(row, call, name)
        elif named is not None:
            return named
        else:
            found = 0.0
            if row.kind in ("matmul", "conv") and row.work.flops:
                found = row.work.flops / (self.calibration.best(row.dtype) or self.calibration.best("fp32") or math.inf)
        return max(found, self.floor + moved / self._bytes_per_s(moved, place.cold))

    def _product(self, dtype: str, batch: int, layout: str, m: int, n: int, k: int) -> float:
        by_layout = self.calibration.matmul.get(dtype) or self.calibration.matmul["fp32"]
        points = by_layout.get(layout) or by_layout["NN"]
        rate = between_three({p[:3]: 2 * p[0] * p[1] * p[2] / p[3] for p in points}, (m, n, k))
        return 2 * batch * m * n * k / rate

    def _convolution(self, row: Row, call: Call, name: str) -> float:
        """As the product of its columns with its weights, times what convolutions here reach of such a product."""
        backward = name.endswith("backward")
        at = 1 if backward else 0
        tensors = arguments(call)
        if len(tensors) < at + 2:
            return 0.0
        weight = tensors[at + 1].shape
        out = tensors[0].shape if backward else call.outputs[0].shape
        k = math.prod(weight[1:])
        m = out[0] * math.prod(out[2:])
        one = self._product(row.dtype, 1, "NN", m, out[1], k)
        share = self.calibration.convolution["backward" if backward else "forward"]
        return one * row.work.flops / max(1, 2 * m * out[1] * k) / share

    def _attention(self, row: Row, call: Call, name: str) -> float:
        by_way = self.calibration.attention.get(row.dtype) or self.calibration.attention["fp32"]
        points = by_way["backward" if "backward" in name else "forward"]
        tensors = arguments(call)
        length = tensors[0].shape[-2] if tensors and len(tensors[0].shape) > 1 else 1
        full = row.work.full_square_flops or row.work.flops
        done = row.work.flops + row.work.recompute_flops
        return done / between(points, length) if full else 0.0

    def _named(self, row: Row, call: Call, name: str, cold: float) -> float | None:
        tensors = arguments(call)
        first = next((t for t in tensors if t.dtype in _FLOATS), None)
        dtype = _FLOATS.get(first.dtype if first else "float32", "fp32")
        known = self.calibration.ops.get(dtype) or self.calibration.ops["fp32"]
        elements = max((math.prod(t.shape) for t in (*tensors, *call.outputs)), default=0)
        table = known.get(_alias(name, call)) or known.get(name.rstrip("_"))
        if table is None or not elements:
            return None
        scale = 1.0 if dtype in self.calibration.ops else {"bf16": 0.5, "fp16": 0.5, "fp64": 2.0}.get(dtype, 1.0)
        hot, far = between(table["hot"], elements), between(table["cold"], elements)
        return self.floor + scale * max(0.0, (1 - cold) * hot + cold * far - self.floor)

    def _bytes_per_s(self, moved: int, cold: float) -> float:
        points = self.calibration.bandwidth["copy"]
        near, far = between(points, moved), points[-1][-1]
        return 1 / ((1 - cold) / near + cold / far)

    # ---- what its place in the step adds

    def around(self, place: Placed) -> float:
        """Seconds beyond the op alone. Less than nothing where a step calls it more cheaply than a benchmark does."""
        over, views = self._over, place.call.views * self._over["view"]
        if place.phase in ("backward", "optimizer"):
            shown = views if place.phase == "optimizer" else views / 2
            return over[place.phase] + shown + place.stream * over.get(f"{place.phase}_cold", 0.0)
        if not place.new_site:  # within a composite, no Python and no new code
            return over["inner"] + views / 2
        entered = over["module"] if place.entered else 0.0
        return over["call"] + views + entered + place.stream * over.get("forward_cold", 0.0)


def product_sizes(name: str, tensors: Sequence[Operand]) -> tuple[int, str, int, int, int]:
    """(batch, layout, M, N, K) of a matrix product by its operands; ``T`` is one whose rows are not contiguous."""
    a, b = tensors[-2:] if name in ("mm", "bmm") else tensors[1:3]
    layout = "".join("N" if t.stride and t.stride[-1] == 1 else "T" for t in (a, b))
    if len(a.shape) == 3:
        return a.shape[0], layout, a.shape[1], b.shape[2], a.shape[2]
    return 1, layout, a.shape[0], b.shape[1], a.shape[1]


def _alias(name: str, call: Call) -> str:
    """The curve's name: an op with a number in a tensor's place has one of its own, and a depthwise convolution."""
    if name in ("add_", "add", "mul", "mul_", "div", "sub") and len(arguments(call)) == 1:
        return f"{name}_scalar"
    return {"clamp_min": "relu", "stack": "cat", "_safe_softmax": "_softmax"}.get(name, name)


# ---- between points


def between(points: Iterable[Point], x: float) -> float:
    """The figure at ``x``, on straight lines of logarithms between (x, figure); beyond the ends, by the end's slope
    for seconds that grow (as elements do), else level.

    >>> round(between([(1, 10.0), (100, 1000.0)], 10), 9)
    100.0
    """
    known = sorted((float(a), float(b)) for a, b in points)
    x = max(x, 1.0)
    if len(known) == 1:
        return known[0][1]
    at = min(max(bisect.bisect_left([a for a, _ in known], x), 1), len(known) - 1)
    (a, fa), (b, fb) = known[at - 1], known[at]
    if x < a:
        return fa
    share = (math.log(x) - math.log(a)) / (math.log(b) - math.log(a))
    if x > b:  # the last slope, at most in proportion
        slope = min(1.0, max(0.0, (math.log(fb) - math.log(fa)) / (math.log(b) - math.log(a))))
        return float(fb * (x / b) ** slope)
    return math.exp((1 - share) * math.log(fa) + share * math.log(fb))


def between_three(known: Mapping[Point, float], at: Point) -> float:
    """The figure at three sizes: trilinear in logarithms among the corners known around it, else the nearest point."""
    axes = [sorted({p[i] for p in known}) for i in range(3)]
    corners = [_around(axis, x) for axis, x in zip(axes, at, strict=True)]
    total = weight = 0.0
    for corner in itertools.product(*corners):
        share = math.prod(s for _, s in corner)
        rate = known.get(tuple(x for x, _ in corner))
        if rate is not None and share > 1e-9:
            total += share * math.log(rate)
            weight += share
    if weight > 1e-6:
        return math.exp(total / weight)
    nearest = min(known, key=lambda p: sum(abs(math.log(a / max(b, 1))) for a, b in zip(p, at, strict=True)))
    return known[nearest]


def _around(axis: list[float], x: float) -> list[tuple[float, float]]:
    """The two neighbours of ``x`` on an axis and their shares; an end alone beyond it."""
    x = min(max(x, axis[0]), axis[-1])
    if len(axis) == 1:
        return [(axis[0], 1.0)]
    at = min(max(bisect.bisect_left(axis, x), 1), len(axis) - 1)
    a, b = axis[at - 1], axis[at]
    share = (math.log(x) - math.log(a)) / (math.log(b) - math.log(a))
    return [(a, 1 - share), (b, share)]
