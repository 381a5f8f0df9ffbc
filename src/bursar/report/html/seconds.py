"""The report's part on time: the forecast, what binds it, and the ops on the roofline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bursar.report import figures
from bursar.report.html import plots
from bursar.report.html.markup import Markup, tag
from bursar.report.html.parts import (
    NARROW,
    WIDE,
    Cell,
    Column,
    Row,
    Section,
    device_of,
    duration,
    figure,
    legend,
    section,
    share,
    table,
    times,
)
from bursar.roofline import Forecast
from bursar.units import format_bytes, format_seconds, format_share

OPS = 200  # rows of the table of ops, and marks of the roofline


def section_of(ops: Sequence[figures.Ops], forecast: Forecast) -> Section:
    """Time, what binds it, and the ops: as marks on the roofline and as a table."""
    device = forecast.cluster.accelerator
    silent = [o for o in ops if not o.flops]
    whole = sum(o.seconds for o in ops) or 1.0
    priced = any(o.forecast_seconds is not None for o in ops)
    parts = [
        (f"b-{k}", v, f"{k} {format_seconds(v)}, {format_share(v / forecast.seconds)}")
        for k, v in forecast.bound_by.items()
    ]
    bars = [
        plots.bar(parts, f"bound-{name}", "What the step's time is bound by", width=w)
        for name, w in (("wide", WIDE), ("narrow", NARROW))
    ]
    pictures = [
        plots.roofline(
            ops,
            f"roofline-{name}",
            device.peak_flops_per_s,
            device.memory_bytes_per_s,
            width=w,
            height=h,
            most=OPS,
            device=device.title,
        )
        for name, w, h in (("wide", WIDE, 420), ("narrow", NARROW, 330))
    ]
    interval = f"{format_seconds(forecast.lower_seconds)} … {format_seconds(forecast.upper_seconds)}"
    rows: list[Row] = [
        ["expected", Cell(format_seconds(forecast.seconds)), f"{interval} (80 %), {forecast.basis}"],
        ["roofline bound", Cell(format_seconds(forecast.roofline_seconds)), "no run on this device beats it"],
        ["MFU", Cell(format_share(forecast.mfu)), f"attention full-square {format_share(forecast.mfu_full_square)}"],
        ["HFU", Cell(format_share(forecast.hfu)), "recompute counted too"],
    ]
    for c in forecast.collectives:
        sent = f"sent per rank, {c.ranks} ranks, {times(c.calls, 'call')}"
        rows.append([c.op.replace("_", "-"), Cell(format_bytes(c.bytes)), sent])
    left_out = (
        f" {times(sum(o.calls for o in silent), 'call')} without FLOPs (copies, lookups, fills) have no place here: "
        f"{format_share(sum(o.seconds for o in silent) / whole)} of the time."
        if silent
        else ""
    )
    caption = (
        "Each mark is a group of calls alike, "
        + (
            "where the forecast of its ops puts it below the roof"
            if priced
            else "where the device's bounds let it stand"
        )
        + ": under the slope memory binds, under the flat roof the arithmetic units do. Area is time."
        + left_out
    )
    return section(
        "time",
        "Time",
        table(
            "times",
            f"One step on {device_of(forecast)}",
            (Column("", number=False), Column(""), Column("", number=False)),
            rows,
            sort=False,
            snug=True,
        ),
        tag("h3", "What binds it"),
        tag("div", tag("div", bars[0], class_="wide"), tag("div", bars[1], class_="narrow")),
        legend((class_, words) for class_, value, words in parts if value > 0),
        tag("h3", "Ops on the roofline"),
        legend(
            (
                ("k-products", "matmul, attention, conv"),
                ("k-vector", "elementwise, reductions, copies"),
                ("k-optimizer", "optimizer"),
            )
        ),
        figure("roofline", [("", pictures[0], pictures[1])], caption, walk="Walk through the ops"),
        tag("h3", "The ops"),
        _ops(ops),
    )


def clock(ops: Iterable[figures.Ops]) -> str:
    """What the seconds of ``ops`` are called."""
    return "forecast time" if any(o.forecast_seconds is not None for o in ops) else "roofline time"


def _ops(ops: Sequence[figures.Ops]) -> Markup:
    whole = sum(o.seconds for o in ops) or 1.0
    rows: list[Row] = [
        [
            Cell(o.op.removeprefix("aten."), o.op),
            plots.place_of(o),
            Cell(o.phase),
            Cell(o.dtype),
            Cell(f"{o.calls:,}", o.calls),
            Cell(
                f"{o.intensity:.3g}" if o.flops and o.moved_bytes else "",
                o.intensity if o.flops and o.moved_bytes else None,
            ),
            Cell(o.bound if o.seconds else ""),
            duration(o.seconds),
            share(o.seconds / whole),
        ]
        for o in ops[:OPS]
    ]
    rest = ops[OPS:]
    foot: Row | None = None
    if rest:
        time = sum(o.seconds for o in rest)
        foot = [
            f"{len(rest)} shorter",
            "",
            "",
            "",
            Cell(f"{sum(o.calls for o in rest):,}"),
            "",
            "",
            duration(time),
            share(time / whole, bar=False),
        ]
    columns = (
        Column("op", number=False),
        Column("module", number=False, name=True),
        Column("phase", number=False, minor=True),
        Column("dtype", number=False, minor=True),
        Column("calls", minor=True),
        Column("FLOP/B", minor=True),
        Column("bound by", number=False, minor=True),
        Column(clock(ops)),
        Column("share"),
    )
    return table(
        "ops",
        "Calls alike together, the longest first; * stands for every number",
        columns,
        rows,
        foot=foot,
        search="Search ops",
    )
