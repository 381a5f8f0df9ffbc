"""Two books side by side: what a step was forecast to cost, and what it cost when it ran. No torch.

Each line has a tolerance that is stated before it is looked at: FLOPs none, bytes at the peak one per cent on a CPU
(or a kernel's own scratch, for a small model), seconds what the forecast's own interval says, and 25 % at least.
Seconds are a line only where somebody forecast them; else they are shown as measured. On a busy machine they are shown
and not judged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bursar.ledger import Ledger, Row
from bursar.rules import MODEL_KINDS
from bursar.units import format_bytes

if TYPE_CHECKING:
    import polars

PEAK_TOLERANCE = {"cpu": 0.01, "cuda": 0.02}  # share of the measured peak; the rest is library scratch and rounding
SECONDS_TOLERANCE = 0.25
SLACK_BYTES = 16384  # what a kernel may take for itself however small the model: an MLP of 230 kB showed 8 kB
SCRATCH = "oneDNN takes scratch inside its kernels, which no op shows"
FRESH_BYTES = 2**25  # a larger block is taken from the system each time, page by page
BUSY = "busy machine"
PROFILE_SECONDS = 2e-6  # what the profiler adds to an op, about


@dataclass(frozen=True)
class Measured:
    """One step as it ran on this machine."""

    device: str  # "cpu" or "cuda"
    name: str  # the machine's own name for it
    model_flops: int  # counted op by op while it ran
    hardware_flops: int
    peak_bytes: int  # by the allocator's record
    step_seconds: tuple[float, ...]  # wall time of each timed step
    cpu_seconds: float  # CPU time of a step, all threads
    rows: tuple[float | None, ...] = ()  # seconds of each row of the forecast, None where the profile has no such op
    busy: str = ""  # why the seconds are not to be trusted
    thread_seconds: tuple[float, ...] = ()  # CPU time of the thread that ran each timed step
    threads: int = 1
    spans: tuple[float | None, ...] = ()  # of each row, from the end of the row before: the calls around it included
    allocated: tuple[int | None, ...] = ()  # bytes each row's op left allocated, less what it freed
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """The median step, on the wall's clock."""
        return _median(self.step_seconds)

    def by(self, clock: str) -> float:
        """The median step on the clock a calibration used: ``cpu`` is the thread's own, else the wall's."""
        return _median(self.thread_seconds) if clock == "cpu" and self.thread_seconds else self.seconds

    @property
    def spread(self) -> tuple[float, float]:
        """The fastest and the slowest step."""
        return min(self.step_seconds), max(self.step_seconds)

    @property
    def profiled_seconds(self) -> float:
        """The seconds of all rows that were found in the profile."""
        return sum(s for s in self.rows if s is not None)

    def ops(self, ledger: Ledger) -> polars.DataFrame:
        """The measured ledger: ``ledger``'s table with ``seconds``, ``span_seconds`` and ``measured_bytes`` of ops."""
        import polars as pl

        none = [None] * len(ledger)
        return ledger.ops.with_columns(
            pl.Series("seconds", list(self.rows) or none, dtype=pl.Float64),
            pl.Series("span_seconds", list(self.spans) or none, dtype=pl.Float64),
            pl.Series("measured_bytes", list(self.allocated) or none, dtype=pl.Int64),
        )


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


@dataclass(frozen=True, slots=True)
class Line:
    """One figure in both books."""

    what: str
    unit: str  # "FLOP", "B" or "s"
    predicted: float
    measured: float
    tolerance: float  # as a share of the measured figure
    cause: str = ""
    judged: bool = True  # whether the machine was quiet enough to tell

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return (self.predicted - self.measured) / self.measured if self.measured else float(self.predicted != 0)

    @property
    def balances(self) -> bool:
        """Whether the error is within the tolerance, or nothing can be said."""
        return not self.judged or abs(self.error) <= self.tolerance


@dataclass(frozen=True, slots=True)
class Part:
    """A group of rows: what it was counted and forecast to cost, and the seconds and bytes it took."""

    name: str
    calls: int
    flops: int  # of the kinds that model FLOPs count, recompute included
    moved_bytes: int
    seconds: float
    forecast_seconds: float | None = None
    span_seconds: float = 0.0  # measured, calls around the ops included, scaled to the timed step
    allocated_bytes: int = 0
    measured_bytes: int | None = None  # allocated, as the profiler saw it
    cause: str = ""

    @property
    def difference(self) -> float:
        """Forecast less measured seconds; 0 without a forecast."""
        return self.forecast_seconds - self.span_seconds if self.forecast_seconds is not None else 0.0


@dataclass(frozen=True)
class Reconciliation:
    """Forecast and measurement of one step."""

    lines: tuple[Line, ...]
    by_kind: tuple[Part, ...]
    by_phase: tuple[Part, ...]
    by_module: tuple[Part, ...]
    unmatched: int  # rows the profile does not show

    @property
    def balances(self) -> bool:
        """Whether every line does."""
        return all(line.balances for line in self.lines)


@dataclass(frozen=True)
class Expected:
    """What was forecast of a step's seconds."""

    seconds: float
    rows: tuple[float, ...] = ()  # of each row; none where the whole step was forecast in one
    upper_seconds: float | None = None  # of the interval
    clock: str = "wall"
    bound_seconds: float = 0.0  # no run takes less: its products at the best rate ever measured
    benchmarked: float = 1.0  # share of the seconds from ops benchmarked by themselves


def reconcile(ledger: Ledger, measured: Measured, forecast_seconds: float | Expected | None = None) -> Reconciliation:
    """``ledger``'s figures against ``measured``; the largest differences and the longest parts first."""
    lines = [
        Line("model FLOPs", "FLOP", ledger.flops.model, measured.model_flops, 0.0),
        Line("hardware FLOPs", "FLOP", ledger.flops.hardware, measured.hardware_flops, 0.0),
        Line("peak memory", "B", ledger.memory.peak_bytes, measured.peak_bytes,
             max(PEAK_TOLERANCE[measured.device], SLACK_BYTES / max(measured.peak_bytes, 1)),
             _cause(ledger, measured)),
    ]  # fmt: skip
    expected = Expected(forecast_seconds) if isinstance(forecast_seconds, (int, float)) else forecast_seconds
    if expected is not None:
        lines.append(_seconds(expected, measured))
    lines.sort(key=lambda line: -abs(line.error))
    return Reconciliation(
        tuple(lines),
        _parts(ledger, measured, [r.kind for r in ledger.recorded], expected),
        _parts(ledger, measured, [r.phase for r in ledger.recorded], expected),
        _parts(ledger, measured, [_block(r.module, r.phase) for r in ledger.recorded], expected),
        sum(s is None for s in measured.rows),
    )


def _seconds(expected: Expected, measured: Measured) -> Line:
    took = measured.by(expected.clock)
    tolerance = SECONDS_TOLERANCE
    if expected.upper_seconds is not None and math.isfinite(expected.upper_seconds) and expected.seconds:
        tolerance = max(tolerance, expected.upper_seconds / expected.seconds - 1)
    busy = measured.busy
    if took < 0.9 * expected.bound_seconds:
        busy = "measured faster than its products can run here: the clock or the calibration is wrong"
    cause = busy
    if not cause and expected.benchmarked < 0.5:
        cause = f"{1 - expected.benchmarked:.0%} of the forecast is read off curves, not benchmarked"
    return Line("seconds", "s", expected.seconds, took, tolerance, cause, not busy)


def _block(module: str, phase: str) -> str:
    return "optimizer step" if phase == "optimizer" else module or "(the model itself)"


def _parts(ledger: Ledger, measured: Measured, names: Sequence[str], expected: Expected | None) -> tuple[Part, ...]:
    rows = measured.rows or (None,) * len(ledger)
    spans = measured.spans or rows
    bytes_kept = measured.allocated or (None,) * len(ledger)
    ahead = expected.rows if expected is not None and len(expected.rows) == len(ledger) else None
    whole = sum(s or 0.0 for s in spans)
    scale = measured.by(expected.clock) / whole if expected is not None and whole else 1.0
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        groups.setdefault(name, []).append(i)
    found = []
    recorded = ledger.recorded
    for name, members in groups.items():
        mine = [recorded[i] for i in members]
        products = [r.work for r in mine if r.kind in MODEL_KINDS and r.phase != "optimizer"]
        seen = [kept for i in members if (kept := bytes_kept[i]) is not None]
        forecast = math.fsum(ahead[i] for i in members) if ahead is not None else None
        took = scale * math.fsum(spans[i] or 0.0 for i in members)
        found.append(
            Part(
                name,
                len(members),
                sum(w.flops + w.recompute_flops for w in products),
                sum(r.work.read_bytes + r.work.written_bytes for r in mine),
                math.fsum(rows[i] or 0.0 for i in members),
                forecast,
                took,
                sum(r.allocated_bytes for r in mine),
                sum(n for n in seen if n > 0) if seen else None,
                _cause_of_part(mine, forecast, took, measured) if forecast is not None else "",
            )
        )
    return tuple(sorted(found, key=lambda p: (-abs(p.difference), -p.seconds, p.name)))


_WAITS = frozenset({"aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero"})


def _cause_of_part(rows: Sequence[Row], forecast: float, took: float, measured: Measured) -> str:
    """Why a part's seconds differ, where that can be told; empty within a tenth, or where nothing is known."""
    if took <= 0 or abs(forecast - took) <= 0.1 * took:
        return ""
    if measured.busy:
        return BUSY
    if measured.device == "cuda" and any(r.op in _WAITS for r in rows):
        return "synchronisation: the host waits for a value"
    if any(r.kind == "uncounted" for r in rows):
        return "an op without a rule"
    if any(r.op.startswith("aten._slow") or "thnn" in r.op for r in rows):
        return "fallback kernel"
    if took > forecast and took / len(rows) < 10 * PROFILE_SECONDS:
        return "many short ops: the profiler itself adds to each"
    if any(r.allocated_bytes > FRESH_BYTES for r in rows):
        return "blocks over 32 MiB: pages fresh from the system"
    moved = sum(r.work.read_bytes + r.work.written_bytes for r in rows)
    if sum(r.work.flops for r in rows) < 10 * moved:
        return "bound by memory: operands nearer or farther than forecast"
    return ""


def _cause(ledger: Ledger, measured: Measured) -> str:
    """What of the peak is a library's own scratch, where that is forecast; else why it differs, where that is known."""
    if measured.device != "cpu":
        return ""
    named = [held for held in ledger.memory.holdings if " in aten." in held.module]
    if named:
        what = ", ".join(f"{format_bytes(held.n_bytes)} {held.module}" for held in named)
        return f"of the forecast, scratch that no op shows: {what}"
    if measured.peak_bytes <= ledger.memory.peak_bytes:
        return ""
    kinds = {r.kind for r in ledger.recorded}
    if "conv" in kinds:
        return f"{SCRATCH}: convolutions"
    if any(r.dtype == "bf16" and r.kind == "matmul" for r in ledger.recorded):
        return f"{SCRATCH}: products in bf16 pack their operands"
    return ""
