"""The report's part on a measurement: both books side by side, and where the measured time went."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bursar.ledger import Ledger
from bursar.reconcile import Measured, Part, Reconciliation
from bursar.report.html.markup import Markup, clipped, tag
from bursar.report.html.parts import CELLS, Cell, Column, Row, Section, amount, bullets, duration, section, share, table
from bursar.report.reconcile import cells as line_cells
from bursar.units import format_flops, format_rate, format_seconds


def section_of(ledger: Ledger, measured: Measured, found: Reconciliation) -> Section:
    """Both books of a step, line by line and part by part."""
    rows: list[Row] = []
    for line in found.lines:
        *shown, verdict = line_cells(line)
        mark, how = ("✗", "no") if not line.balances else ("✓", "yes") if line.judged else ("", "soft")
        words = f"{mark} {verdict or 'balances'}".strip()
        rows.append([*shown, Cell(tag("span", words, class_=how))])
    columns = (
        Column("figure", number=False),
        Column("forecast"),
        Column("measured"),
        Column("error"),
        Column("within", minor=True),
        Column("verdict", number=False),
    )
    fastest, slowest = measured.spread
    rate = format_rate(measured.model_flops / measured.seconds, "FLOP")
    words = (
        f"A step took {format_seconds(measured.seconds)} (median of {len(measured.step_seconds)}, "
        f"{format_seconds(fastest)} to {format_seconds(slowest)}), {rate}."
    )
    causes = [f"{x.what}: {x.cause}" for x in found.lines if x.cause and x.error]
    return section(
        "measured",
        "Forecast and measurement",
        table("books", f"Both books of one step, run on {measured.name}", columns, rows, sort=False),
        tag("p", words),
        tag("p", measured.busy, class_="no") if measured.busy else None,
        bullets([*causes, *measured.notes]) if causes or measured.notes else None,
        *_beside(found),
        tag("h3", "Where the measured time went"),
        _parts("measured-kinds", "kind", "By kind, one profiled step", found.by_kind),
        _parts("measured-modules", "module", "By module", found.by_module, search="Search measured modules"),
        tag("p", f"{found.unmatched} of {len(ledger)} rows were not found in the profile.", class_="soft")
        if found.unmatched
        else None,
    )


def _beside(found: Reconciliation) -> Iterator[Markup]:
    """Forecast and measured seconds of each part, the largest differences first, where there was a forecast."""
    columns = (
        Column("part", number=False),
        Column("forecast"),
        Column("measured"),
        Column("difference"),
        Column("allocates", minor=True),
        Column("measured", minor=True),
    )
    for what, parts in (("kind", found.by_kind), ("phase", found.by_phase), ("module", found.by_module)):
        if not any(p.forecast_seconds is not None for p in parts):
            continue
        rows: list[Row] = [
            [
                clipped(p.name),
                duration(p.forecast_seconds or 0.0),
                duration(p.span_seconds),
                Cell(("+" if p.difference >= 0 else "−") + format_seconds(abs(p.difference)), p.difference),
                amount(p.allocated_bytes),
                amount(p.measured_bytes) if p.measured_bytes is not None else Cell(""),
            ]
            for p in parts[:CELLS]
        ]
        caption = f"Seconds by {what}, the largest differences first; measured with the calls around the ops"
        yield table(f"beside-{what}", caption, columns, rows)


def _parts(id_: str, what: str, caption: str, parts: Sequence[Part], search: str = "") -> Markup:
    whole = sum(p.seconds for p in parts) or 1.0
    rows: list[Row] = [
        [
            clipped(p.name),
            duration(p.seconds),
            share(p.seconds / whole),
            Cell(format_flops(p.flops) if p.flops else "", p.flops),
            Cell(
                format_rate(p.flops / p.seconds, "FLOP") if p.flops and p.seconds else "",
                p.flops / p.seconds if p.flops and p.seconds else None,
            ),
            amount(p.moved_bytes),
        ]
        for p in parts[:CELLS]
    ]
    foot: Row | None = None
    if parts[CELLS:]:
        foot = [f"{len(parts) - CELLS} more", duration(sum(p.seconds for p in parts[CELLS:])), "", "", "", ""]
    columns = (
        Column(what, number=False),
        Column("seconds"),
        Column("share"),
        Column("FLOPs", minor=True),
        Column("achieved", minor=True),
        Column("bytes moved", minor=True),
    )
    return table(id_, caption, columns, rows, foot=foot, search=search)
