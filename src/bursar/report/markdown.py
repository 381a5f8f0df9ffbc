"""Markdown: tables whose cells are text, and the page of a step for a pull request or a wiki."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bursar.errors import printable
from bursar.ledger import Ledger
from bursar.memory import CLASSES
from bursar.modules import label, shares
from bursar.report import figures
from bursar.roofline import Forecast
from bursar.units import format_bytes, format_count, format_flops, format_seconds, format_share

_MODULES = 100  # rows; what is beyond stands in one more


def escaped(text: str) -> str:
    r"""Text as Markdown shows it literally: names are the user's, and may be markup.

    >>> print(escaped("<b>*|"))
    &lt;b&gt;\*\|
    """
    plain = printable(text, keep="").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#@~$!])", r"\\\1", plain)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, an empty one at its end; the first column to the left, of six or more the second too."""

    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(escaped(cell) for cell in cells)} |"

    left = 1 if len(columns) < 6 else 2
    marks = [":--"] * left + ["--:"] * (len(columns) - left)
    return [row(columns), f"| {' | '.join(marks)} |", *map(row, rows), ""]


def step(ledger: Ledger, forecast: Forecast | None = None) -> str:
    """The headline, memory by class, kinds, modules and assumptions of a step."""
    flops, memory, model = ledger.flops, ledger.memory, ledger.model
    least = "at least " if flops.uncounted else ""
    head = [
        ("peak memory", format_bytes(memory.peak_bytes), f"{memory.peak_bytes:,} bytes"),
        ("model FLOPs", least + format_flops(flops.model), "forward + backward"),
        ("hardware FLOPs", least + format_flops(flops.hardware), "with recompute"),
    ]
    if forecast is not None:
        interval = f"{format_seconds(forecast.lower_seconds)} … {format_seconds(forecast.upper_seconds)}"
        verdict = "fits" if forecast.fits else "does not fit"
        head += [
            ("step time", format_seconds(forecast.seconds), f"{interval}, {forecast.basis}"),
            ("MFU", format_share(forecast.mfu), f"HFU {format_share(forecast.hfu)}, {forecast.basis}"),
            ("memory", verdict, f"{format_bytes(forecast.usable_bytes)} usable"),
        ]
    on = f" on {forecast.cluster.count} × {forecast.cluster.accelerator.title}" if forecast else ""
    title = f"{model.name or 'A step'}{on}: one training step"
    size = (
        f"{format_count(model.parameters)} parameters, {ledger.step.samples:,} samples, {ledger.step.tokens:,} tokens."
    )
    out = [f"# {escaped(title)}", "", escaped(size), "", *markdown_table(("", "", ""), head)]
    out += [
        "## Memory",
        "",
        *markdown_table(
            ("class", "at the peak", "share", "between steps"),
            [
                (
                    c.replace("_", " "),
                    format_bytes(at),
                    format_share(at / max(1, memory.peak_bytes)),
                    format_bytes(between),
                )
                for c in CLASSES
                if (at := memory.at_peak[c]) | (between := memory.between_steps[c])
            ],
        ),
    ]
    timed = forecast is not None
    kinds = figures.kinds(figures.merged(ledger, forecast))
    out += [
        "## Kinds",
        "",
        *markdown_table(
            ("kind", "calls", "FLOPs", "bytes moved", *(("roofline time",) if timed else ())),
            [
                (
                    k.kind,
                    f"{k.calls:,}",
                    format_flops(k.flops * ledger.replicas),
                    format_bytes(k.moved_bytes),
                    *((format_seconds(k.seconds),) if timed else ()),
                )
                for k in kinds
            ],
        ),
    ]
    found = shares(ledger, forecast.cluster.accelerator if forecast is not None else None)
    rows = [
        (
            label(m.module, m.copies),
            f"{m.copies:,}",
            format_flops(m.copies * m.flops),
            format_bytes(m.copies * m.bytes_moved),
            format_bytes(m.copies * m.bytes_at_peak),
            *((format_seconds(m.copies * (m.roofline_seconds or 0)),) if timed else ()),
        )
        for m in found[:_MODULES]
    ]
    if rest := found[_MODULES:]:
        rows.append(
            (
                f"{len(rest)} more",
                f"{sum(m.copies for m in rest):,}",
                format_flops(sum(m.copies * m.flops for m in rest)),
                format_bytes(sum(m.copies * m.bytes_moved for m in rest)),
                format_bytes(sum(m.copies * m.bytes_at_peak for m in rest)),
                *((format_seconds(sum(m.copies * (m.roofline_seconds or 0) for m in rest)),) if timed else ()),
            )
        )
    columns = ("module", "alike", "FLOPs", "bytes moved", "at the peak", *(("roofline time",) if timed else ()))
    out += ["## Modules, those alike together", "", *markdown_table(columns, rows)]
    if flops.uncounted:
        out += [
            "## Uncounted ops: their FLOPs are unknown",
            "",
            *markdown_table(
                ("op", "calls", "bytes"), [(u.op, f"{u.calls:,}", format_bytes(u.bytes)) for u in flops.uncounted]
            ),
        ]
    out += ["## Assumptions", ""]
    out += [f"- {escaped(text)}" for text in (*ledger.assumptions, *(forecast.assumptions if forecast else ()))]
    versions = ", ".join(f"{k} {v}" for k, v in ledger.versions.items())
    return "\n".join([*out, "", escaped(f"Made with {versions}."), ""])
