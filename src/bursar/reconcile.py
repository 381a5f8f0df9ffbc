"""Two books side by side: what a step was forecast to cost, and what it cost when it ran. No torch.

Each line has a tolerance that is stated before it is looked at: FLOPs none, bytes at the peak one per cent on a CPU
(or a kernel's own scratch, for a small model).
Seconds are a line only where somebody forecast them; else they are shown as measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bursar.ledger import Ledger
from bursar.rules import MODEL_KINDS
from bursar.units import format_bytes

PEAK_TOLERANCE = {"cpu": 0.01, "cuda": 0.02}  # share of the measured peak; the rest is library scratch and rounding
SLACK_BYTES = 16384  # what a kernel may take for itself however small the model: an MLP of 230 kB showed 8 kB
SCRATCH = "oneDNN takes scratch inside its kernels, which no op shows"


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

    @property
    def seconds(self) -> float:
        """The median step."""
        ordered = sorted(self.step_seconds)
        half = len(ordered) // 2
        return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2

    @property
    def spread(self) -> tuple[float, float]:
        """The fastest and the slowest step."""
        return min(self.step_seconds), max(self.step_seconds)

    @property
    def profiled_seconds(self) -> float:
        """The seconds of all rows that were found in the profile."""
        return sum(s for s in self.rows if s is not None)


@dataclass(frozen=True, slots=True)
class Line:
    """One figure in both books."""

    what: str
    unit: str  # "FLOP", "B" or "s"
    predicted: float
    measured: float
    tolerance: float  # as a share of the measured figure
    cause: str = ""

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return (self.predicted - self.measured) / self.measured if self.measured else float(self.predicted != 0)

    @property
    def balances(self) -> bool:
        """Whether the error is within the tolerance."""
        return abs(self.error) <= self.tolerance


@dataclass(frozen=True, slots=True)
class Part:
    """A group of rows: what it was counted to cost and the seconds it took."""

    name: str
    calls: int
    flops: int  # of the kinds that model FLOPs count, recompute included
    moved_bytes: int
    seconds: float


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


def reconcile(ledger: Ledger, measured: Measured, forecast_seconds: float | None = None) -> Reconciliation:
    """``ledger``'s figures against ``measured``; the largest differences and the longest parts first."""
    lines = [
        Line("model FLOPs", "FLOP", ledger.flops.model, measured.model_flops, 0.0),
        Line("hardware FLOPs", "FLOP", ledger.flops.hardware, measured.hardware_flops, 0.0),
        Line("peak memory", "B", ledger.memory.peak_bytes, measured.peak_bytes,
             max(PEAK_TOLERANCE[measured.device], SLACK_BYTES / max(measured.peak_bytes, 1)),
             _cause(ledger, measured)),
    ]  # fmt: skip
    if forecast_seconds is not None:
        lines.append(Line("seconds", "s", forecast_seconds, measured.seconds, 0.25, measured.busy))
    lines.sort(key=lambda line: -abs(line.error))
    return Reconciliation(
        tuple(lines),
        _parts(ledger, measured, [r.kind for r in ledger.recorded]),
        _parts(ledger, measured, [r.phase for r in ledger.recorded]),
        _parts(ledger, measured, [_block(r.module, r.phase) for r in ledger.recorded]),
        sum(s is None for s in measured.rows),
    )


def _block(module: str, phase: str) -> str:
    return "optimizer step" if phase == "optimizer" else module or "(the model itself)"


def _parts(ledger: Ledger, measured: Measured, names: Sequence[str]) -> tuple[Part, ...]:
    found: dict[str, list[float]] = {}
    rows = measured.rows or (None,) * len(ledger)
    for name, row, seconds in zip(names, ledger.recorded, rows, strict=True):
        entry = found.setdefault(name, [0, 0, 0, 0.0])
        entry[0] += 1
        if row.kind in MODEL_KINDS and row.phase != "optimizer":
            entry[1] += row.work.flops + row.work.recompute_flops
        entry[2] += row.work.read_bytes + row.work.written_bytes
        entry[3] += seconds or 0.0
    parts = (Part(name, int(e[0]), int(e[1]), int(e[2]), e[3]) for name, e in found.items())
    return tuple(sorted(parts, key=lambda part: (-part.seconds, part.name)))


def _cause(ledger: Ledger, measured: Measured) -> str:
    """What of the peak is a library's own scratch, where that is forecast; else why it differs, where that can be told."""
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
