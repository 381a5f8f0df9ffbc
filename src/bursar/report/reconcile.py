"""The page and the JSON of ``bursar step --measure``: both books side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bursar.ledger import Ledger
from bursar.reconcile import BUSY, Line, Measured, Part, Reconciliation
from bursar.report.record import SCHEMA_VERSION
from bursar.report.text import line, note, table
from bursar.units import format_bytes, format_flops, format_rate, format_seconds, format_share

_WRITE: dict[str, Callable[[float], str]] = {"FLOP": format_flops, "B": format_bytes, "s": format_seconds}
_LONGEST = 12  # modules shown


def record(ledger: Ledger, measured: Measured, found: Reconciliation) -> dict[str, Any]:
    """Every line and part, unrounded; ``seconds`` of a part are those of one profiled step."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model": ledger.model.name,
        "machine": {"device": measured.device, "name": measured.name},
        "balances": found.balances,
        "lines": [
            {
                "what": x.what,
                "unit": x.unit,
                "predicted": x.predicted,
                "measured": x.measured,
                "error": x.error,
                "tolerance": x.tolerance,
                "balances": x.balances,
                "judged": x.judged,
                "cause": x.cause or None,
            }
            for x in found.lines
        ],
        "seconds": {
            "median": measured.seconds,
            "fastest": measured.spread[0],
            "slowest": measured.spread[1],
            "steps": len(measured.step_seconds),
            "cpu": measured.cpu_seconds,
            "thread": measured.by("cpu") if measured.thread_seconds else None,
            "threads": measured.threads,
            "busy": measured.busy or None,
        },
        "by_kind": _records(found.by_kind),
        "by_phase": _records(found.by_phase),
        "by_module": _records(found.by_module),
        "unmatched_rows": found.unmatched,
        "notes": list(measured.notes),
        "assumptions": list(ledger.assumptions),
        "versions": dict(ledger.versions),
    }


def _records(parts: Sequence[Part]) -> list[dict[str, Any]]:
    return [
        {
            "name": p.name,
            "calls": p.calls,
            "flops": p.flops,
            "bytes": p.moved_bytes,
            "seconds": p.seconds,
            "forecast_seconds": p.forecast_seconds,
            "measured_seconds": p.span_seconds,
            "allocated_bytes": p.allocated_bytes,
            "measured_allocated_bytes": p.measured_bytes,
            "cause": p.cause or None,
        }
        for p in parts
    ]


def render(ledger: Ledger, measured: Measured, found: Reconciliation) -> Iterator[Any]:
    """Forecast against measurement, then where the time went."""
    yield line(f"{ledger.model.name}: one step, forecast and measured on this machine ({measured.name})", style="bold")
    yield table(
        "",
        ("", "forecast", "measured", "error", "within", ""),
        [cells(x) for x in found.lines],
    )
    for x in found.lines:
        if x.cause and x.error:
            yield note(f"{x.what}: {x.cause}")
    fastest, slowest = measured.spread
    achieved = measured.model_flops / measured.seconds
    yield line(
        f"A step takes {format_seconds(measured.seconds)} (median of {len(measured.step_seconds)}, "
        f"{format_seconds(fastest)} to {format_seconds(slowest)}; {format_seconds(measured.cpu_seconds)} of CPU): "
        f"{format_rate(achieved, 'FLOP')}."
    )
    if measured.busy:
        yield note(f"{measured.busy}; the seconds below are not to be trusted, measure again")
    for text in measured.notes:
        yield note(text)
    if any(p.forecast_seconds is not None for p in found.by_kind):
        yield from _beside(found)
    total = measured.profiled_seconds
    for title, parts in (("By kind", found.by_kind), ("By phase", found.by_phase), ("By module", found.by_module)):
        yield table(title, ("", "seconds", "share", "FLOPs", "achieved", "moved"),
                    [_part(p, total) for p in parts[:_LONGEST]])  # fmt: skip
        if len(parts) > _LONGEST:
            rest = sum(p.seconds for p in parts[_LONGEST:])
            yield note(f"{len(parts) - _LONGEST} more: {format_seconds(rest)}")
    if found.unmatched:
        yield note(f"{found.unmatched} of {len(ledger)} rows were not found in the profile")
    if ledger.uncounted:
        yield note("at least: " + ", ".join(f"{u.op} (×{u.calls})" for u in ledger.uncounted) + " have no rule")
    yield line("Assumptions", style="bold")
    for text in ledger.assumptions:
        yield note(text)


def _beside(found: Reconciliation) -> Iterator[Any]:
    """Forecast and measured seconds of each part, the largest differences first; what was allocated in both."""
    for title, parts in (("kind", found.by_kind), ("phase", found.by_phase), ("module", found.by_module)):
        yield table(
            f"Seconds by {title}, the largest differences first (measured: calls around the ops included)",
            ("", "forecast", "measured", "difference", "allocates", "measured"),
            [
                (
                    p.name,
                    format_seconds(p.forecast_seconds or 0.0),
                    format_seconds(p.span_seconds),
                    ("+" if p.difference >= 0 else "−") + format_seconds(abs(p.difference)),
                    format_bytes(p.allocated_bytes) if p.allocated_bytes else "",
                    format_bytes(p.measured_bytes) if p.measured_bytes else "",
                )
                for p in parts[:_LONGEST]
            ],
        )
        for p in parts[:_LONGEST]:
            if p.cause and p.cause != BUSY:
                yield note(f"{p.name}: {p.cause}")


def cells(x: Line) -> tuple[str, str, str, str, str, str]:
    """One line as a table shows it: what, forecast, measured, error, tolerance, and whether it is beyond that."""
    write = _WRITE[x.unit]
    error = "equal" if x.predicted == x.measured else f"{x.error:+.2%}"
    within = "exact" if not x.tolerance else f"±{x.tolerance:.0%}"
    return (
        x.what,
        write(x.predicted),
        write(x.measured),
        error,
        within,
        ("" if x.balances else "does not balance") if x.judged else "not judged",
    )


def _part(p: Part, total: float) -> tuple[str, ...]:
    achieved = format_rate(p.flops / p.seconds, "FLOP") if p.flops and p.seconds else ""
    return (
        p.name,
        format_seconds(p.seconds),
        format_share(p.seconds / total) if total else "",
        format_flops(p.flops) if p.flops else "",
        achieved,
        format_bytes(p.moved_bytes),
    )
