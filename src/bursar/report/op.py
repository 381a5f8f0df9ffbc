"""The page and the JSON of ``bursar op``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from bursar.operation import Measured, Priced
from bursar.report.record import SCHEMA_VERSION
from bursar.report.text import line, table
from bursar.units import format_bytes, format_flops, format_rate, format_seconds, format_share

_SMALL = 10**5  # below this a count is printed whole: hand arithmetic is to be recognised


class KernelRecord(msgspec.Struct):
    """One kernel of the operation."""

    op: str
    kind: str
    flops: int
    recompute_flops: int
    read_bytes: int
    written_bytes: int
    bound_seconds: float | None


class SpeedUp(msgspec.Struct):
    """How many times the rate of another dtype."""

    over: str
    ratio: float


class MeasuredRecord(msgspec.Struct):
    """One dtype, timed here. The counts are those of ``op``, which is smaller than what was asked if ``shrunk_by``."""

    op: str
    device: str
    flops: int
    bytes: int
    seconds: float
    iqr_seconds: float
    cpu_seconds: float
    repeats: int
    threads: int
    cpus: int
    shrunk_by: int
    canary_flops_per_s: tuple[float, float]
    flops_per_s: float
    bytes_per_s: float
    mfu: float | None
    mfu_note: str
    speed_up: SpeedUp | None
    notes: tuple[str, ...]


class Result(msgspec.Struct):
    """One dtype. ``flops`` is what MFU divides; ``intensity`` counts recompute too. Times are None without a device."""

    dtype: str
    kind: str | None
    flops: int
    recompute_flops: int
    full_square_flops: int
    read_bytes: int
    written_bytes: int
    bytes: int
    intensity: float | None
    on: str | None
    peak_flops_per_s: float | None
    ridge: float | None
    compute_seconds: float | None
    memory_seconds: float | None
    bound_seconds: float | None
    bound_by: str | None
    mfu_at_bound: float | None
    mfu: float | None
    kernels: list[KernelRecord]
    measured: MeasuredRecord | None


class OpRecord(msgspec.Struct, kw_only=True):
    """What ``bursar op --json`` prints."""

    schema_version: int = SCHEMA_VERSION
    op: str
    results: list[Result]
    assumptions: list[str]


def record(priced: Sequence[Priced], measured: Sequence[Measured] = ()) -> OpRecord:
    """The record of one operation, a result per dtype; ``measured`` is in the order of ``priced``, or empty."""
    timed: list[Measured | None] = [*measured] or [None] * len(priced)
    return OpRecord(
        op=priced[0].operation.text,
        results=[_result(p, m, measured) for p, m in zip(priced, timed, strict=True)],
        assumptions=_assumptions(priced),
    )


def _result(p: Priced, m: Measured | None, all_measured: Sequence[Measured]) -> Result:
    return Result(
        dtype=p.operation.dtype,
        kind=p.kind,
        flops=p.flops,
        recompute_flops=p.recompute_flops,
        full_square_flops=p.full_square_flops,
        read_bytes=p.read_bytes,
        written_bytes=p.written_bytes,
        bytes=p.bytes,
        intensity=p.intensity,
        on=p.device.name if p.device else None,
        peak_flops_per_s=p.peak_flops_per_s,
        ridge=p.ridge,
        compute_seconds=p.compute_seconds,
        memory_seconds=p.memory_seconds,
        bound_seconds=p.bound_seconds,
        bound_by=p.bound_by,
        mfu_at_bound=p.mfu_at_bound,
        mfu=m.mfu if m else None,
        kernels=[
            KernelRecord(x.op, x.kind, x.work.flops, x.work.recompute_flops, x.work.read_bytes, x.work.written_bytes,
                         x.bound_seconds)
            for x in p.kernels
        ],
        measured=_timed(m, all_measured) if m else None,
    )  # fmt: skip


def _timed(m: Measured, all_measured: Sequence[Measured]) -> MeasuredRecord:
    base = _base(m, all_measured)
    return MeasuredRecord(
        op=m.operation.text,
        device=m.device,
        flops=m.flops,
        bytes=m.bytes,
        seconds=m.seconds,
        iqr_seconds=m.iqr_seconds,
        cpu_seconds=m.cpu_seconds,
        repeats=m.repeats,
        threads=m.threads,
        cpus=m.cpus,
        shrunk_by=m.shrunk_by,
        canary_flops_per_s=m.canary_flops_per_s,
        flops_per_s=m.flops_per_s,
        bytes_per_s=m.bytes_per_s,
        mfu=m.mfu,
        mfu_note=m.mfu_note,
        speed_up=SpeedUp(base.operation.dtype, m.speed_up(base)) if base else None,
        notes=m.notes,
    )


def render(priced: Sequence[Priced], measured: Sequence[Measured] = (), *, explain: bool = False) -> Iterator[Any]:
    """Headline, counts, kernels where there are several, the bound, what was measured, assumptions."""
    first = priced[0]
    yield line(first.operation.text, style="bold")
    yield table(
        "What it asks (a multiply and an add are two FLOPs)",
        ("dtype", "FLOPs", "", "bytes read", "bytes written", "FLOP/B"),
        [
            (p.operation.dtype, _flops(p.flops), _beside(p), _bytes(p.read_bytes), _bytes(p.written_bytes),
             "n/a" if p.intensity is None else f"{p.intensity:.4g}")
            for p in priced
        ],
    )  # fmt: skip
    if len(first.kernels) > 1:
        yield table(
            f"Its {len(first.kernels)} kernels in {first.operation.dtype}",
            ("kernel", "kind", "FLOPs", "bytes read", "bytes written"),
            [
                (x.op.removeprefix("aten."), x.kind, _flops(x.work.flops), _bytes(x.work.read_bytes),
                 _bytes(x.work.written_bytes))
                for x in first.kernels
            ],
            left=2,
        )  # fmt: skip
    if first.device is not None:
        yield table(
            f"The least it takes on one {first.device.title}",
            ("dtype", "time", "bound by", "compute", "memory", "ridge FLOP/B", "MFU at most"),
            [
                (p.operation.dtype, format_seconds(p.bound_seconds), p.bound_by or "nothing",
                 format_seconds(p.compute_seconds), format_seconds(p.memory_seconds),
                 "n/a" if p.ridge is None else f"{p.ridge:.1f}", format_share(p.mfu_at_bound))
                for p in priced
            ],
        )  # fmt: skip
    if measured:
        yield from _measured(measured)
    if explain:
        yield from _explain(first, measured)
    if notes := _assumptions(priced):
        yield line("Assumptions", style="bold")
        for note in notes:
            yield line(f"  {note}")
    if first.device is None and not measured:
        yield line("  no --on, so no time: try --on h100-sxm (bursar hardware lists them), or --measure to run it here")


def _measured(measured: Sequence[Measured]) -> Iterator[Any]:
    first = measured[0]
    where = f"{first.threads} threads on {first.cpus} cores" if first.device == "cpu" else first.device
    yield table(
        f"Measured here: {first.operation.text} ({where})",
        ("dtype", "median", "± IQR", "CPU time", "repeats", "FLOP/s", "bytes/s", "MFU", "speed-up"),
        [
            (m.operation.dtype, format_seconds(m.seconds), format_seconds(m.iqr_seconds), format_seconds(m.cpu_seconds),
             str(m.repeats), format_rate(m.flops_per_s, "FLOP"), format_rate(m.bytes_per_s, "B"), format_share(m.mfu),
             _speed_up(m, measured))
            for m in measured
        ],
    )  # fmt: skip
    said: dict[str, list[str]] = {}
    for m in measured:
        for note in (f"MFU: {m.mfu_note}", *m.notes):
            said.setdefault(note, []).append(m.operation.dtype)
    for note, dtypes in said.items():
        yield line(f"  {note}" if len(dtypes) == len(measured) else f"  {', '.join(dtypes)}: {note}")


def _explain(priced: Priced, measured: Sequence[Measured]) -> Iterator[Any]:
    yield line("Where the figures come from", style="bold")
    yield line("  FLOPs and bytes: the rule of each kernel, by its shapes (counted)")
    yield line("  FLOP/B = FLOPs executed, recompute included ÷ bytes read and written")
    if (device := priced.device) is not None and priced.peak_flops_per_s is not None:
        peak, bandwidth = priced.peak_flops_per_s, device.memory_bytes_per_s
        source = device.sources.get
        yield line(f"  peak = {format_rate(peak, 'FLOP')} dense: {source('peak_flops_per_s', '')}")
        yield line(f"  bandwidth = {format_rate(bandwidth, 'B')}: {source('memory_bytes_per_s', '')}")
        yield line("  time = Σ over kernels of max(FLOPs ÷ peak, bytes ÷ bandwidth); ridge = peak ÷ bandwidth")
    if measured:
        before, after = measured[0].canary_flops_per_s
        yield line("  measured: median of the repeats; MFU = FLOPs ÷ median ÷ peak, the speed-up of FLOP/s (measured)")
        yield line(
            f"  canary product: {format_rate(before, 'FLOP')} before the first, {format_rate(after, 'FLOP')} after"
        )


def _assumptions(priced: Sequence[Priced]) -> list[str]:
    return list(dict.fromkeys(note for p in priced for note in p.assumptions))


def _base(m: Measured, measured: Sequence[Measured]) -> Measured | None:
    """What speed-ups are over: fp32, or else the first dtype; None for itself, or with nothing to count."""
    base = next((x for x in measured if x.operation.dtype == "fp32"), measured[0])
    return None if base is m or not (m.flops or m.bytes) else base


def _speed_up(m: Measured, measured: Sequence[Measured]) -> str:
    base = _base(m, measured)
    return f"{m.speed_up(base):.2f}× {base.operation.dtype}" if base else ""


def _beside(p: Priced) -> str:
    parts = []
    if p.recompute_flops:
        parts.append(f"+ {_flops(p.recompute_flops)} recompute")
    if p.full_square_flops != p.flops:
        parts.append(f"full-square {_flops(p.full_square_flops)}")
    return ", ".join(parts) or (f"{p.flops}" if p.flops >= _SMALL else "")


def _flops(n: int) -> str:
    return f"{n} FLOP" if n < _SMALL else format_flops(n)


def _bytes(n: int) -> str:
    return f"{n} B" if n < _SMALL else format_bytes(n)
