"""The report of a step: one file that opens from disk, works without its script and asks nothing of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from bursar.ledger import Ledger
from bursar.memory import CLASSES
from bursar.modules import Share, label, shares
from bursar.reconcile import Measured, Part, Reconciliation
from bursar.report import figures
from bursar.report.gradients import layers
from bursar.report.html import plots
from bursar.report.html.markup import Markup, clipped, document, join, tag
from bursar.report.html.parts import (
    CELLS,
    Cell,
    Column,
    Row,
    Section,
    contents,
    figure,
    headline,
    legend,
    section,
    swatch,
    table,
)
from bursar.report.reconcile import cells as line_cells
from bursar.roofline import Forecast
from bursar.units import format_bytes, format_count, format_flops, format_rate, format_seconds, format_share

COLUMNS = 360  # of the timeline: more than a phone's pixels, and a step of 6000 ops stays under 100 kB
OPS = 200  # rows of the table of ops, and marks of the roofline
WIDE, NARROW = 952, 358  # a desktop's column; a phone of 390 less its margins


@dataclass(frozen=True)
class Subject:
    """What a report is of: a ledger, priced where there is a device, measured where it was run."""

    ledger: Ledger
    forecast: Forecast | None = None
    measured: Measured | None = None
    found: Reconciliation | None = None
    command: str = ""  # what was asked, as it may be asked again
    gradients: bool = False

    @cached_property
    def shares(self) -> list[Share]:
        """What each module costs."""
        return shares(self.ledger, self.forecast.cluster.accelerator if self.forecast is not None else None)

    @cached_property
    def ops(self) -> list[figures.Ops]:
        """The ops, calls alike together."""
        return figures.merged(self.ledger, self.forecast)

    @property
    def least(self) -> str:
        """What is put before FLOPs that are not all counted."""
        return "at least " if self.ledger.uncounted else ""


def render(
    ledger: Ledger,
    forecast: Forecast | None = None,
    *,
    measured: Measured | None = None,
    found: Reconciliation | None = None,
    command: str = "",
    gradients: bool = False,
) -> str:
    """The whole page. ``measured`` and ``found`` add what a real run took; ``command`` is shown, to be run again."""
    subject = Subject(ledger, forecast, measured, found, command, gradients)
    parts = [part for part in _sections(subject) if part is not None]
    body = (
        tag("a", "Skip to the report", href="#main", class_="skip"),
        _header(subject),
        contents(parts),
        tag("main", *(part.markup for part in parts), id="main"),
        _footer(ledger),
    )
    where = f" on {_on(forecast)}" if forecast else ""
    return document(f"{ledger.model.name or 'A step'}{where}: what one training step costs", body)


def _sections(s: Subject) -> Iterator[Section | None]:
    yield _memory(s)
    yield _where(s)
    if s.forecast is not None:
        yield _time(s.ops, s.forecast)
    yield _measurement(s)
    yield _modules(s)
    yield _kinds(s)
    if s.gradients:
        yield _gradients(s.ledger)
    yield _uncounted(s.ledger)
    yield _assumptions(s)


# -------------------------------------------------------------------------------------------------------------- header


def _on(forecast: Forecast) -> str:
    cluster = forecast.cluster
    return f"{cluster.count} × {cluster.accelerator.title}" if cluster.count > 1 else cluster.accelerator.title


def _header(s: Subject) -> Markup:
    ledger, forecast = s.ledger, s.forecast
    model, step, flops, peak = ledger.model, ledger.step, ledger.flops, ledger.memory.peak_bytes
    size = (
        f"{format_count(model.parameters)} parameters, {_times(step.samples, 'sample')} = "
        f"{_times(step.tokens, 'token')} in {_times(step.micro_batches, 'micro-batch')}"
    )
    where = f"on {_on(forecast)}" if forecast else "on the CPU" if ledger.device == "cpu" else "on a GPU in general"
    shown: list[tuple[str, object, object, dict[str, object]]] = [
        (
            "Peak memory" + (" of each" if forecast and forecast.cluster.count > 1 else ""),
            format_bytes(peak),
            _room(s),
            {"data_peak_bytes": peak},
        ),
        (
            "Model FLOPs of the step",
            s.least + format_flops(flops.model),
            f"hardware {format_flops(flops.hardware)}, counted",
            {"data_model_flops": flops.model},
        ),
    ]
    if forecast is not None:
        interval = f"{format_seconds(forecast.lower_seconds)} … {format_seconds(forecast.upper_seconds)}"
        shown += [
            (
                "Step time",
                format_seconds(forecast.seconds),
                f"{interval}, {forecast.basis}",
                {"data_seconds": repr(forecast.seconds)},
            ),
            (
                "MFU",
                format_share(forecast.mfu),
                f"HFU {format_share(forecast.hfu)}, {forecast.basis}",
                {"data_mfu": repr(forecast.mfu)},
            ),
        ]
    if s.measured is not None:
        low, high = s.measured.spread
        shown.append(
            (
                "Measured step",
                format_seconds(s.measured.seconds),
                f"{format_seconds(low)} … {format_seconds(high)}, {s.measured.name}",
                {},
            )
        )
    return tag(
        "header",
        tag("p", "One training step, accounted for by bursar", class_="kicker"),
        tag("h1", model.name or "A training step"),
        tag("p", f"{size}, {where}", class_="lede"),
        tag("p", tag("code", s.command), class_="command") if s.command else None,
        headline(shown),
    )


def _room(s: Subject) -> Markup | str:
    forecast = s.forecast
    if forecast is None:
        return "counted"
    verdict = ("yes", "✓ fits") if forecast.fits else ("no", "✗ does not fit")
    return join(
        (tag("span", verdict[1], class_=f"verdict {verdict[0]}"), f" in {format_bytes(forecast.usable_bytes)} usable")
    )


# -------------------------------------------------------------------------------------------------------------- memory


def _memory(s: Subject) -> Section:
    ledger, forecast = s.ledger, s.forecast
    seconds = figures.row_seconds(ledger, forecast) if forecast is not None else None
    course = figures.course(ledger, seconds, COLUMNS)
    capacity = forecast.usable_bytes if forecast is not None else None
    about = f"Stacked areas of the seven classes of memory over one step. {_peak_words(ledger)}"
    pictures = [
        plots.timeline(course, f"timeline-{name}", width=w, height=h, capacity=capacity, about=about)
        for name, w, h in (("wide", WIDE, 330), ("narrow", NARROW, 260))
    ]
    said = plots.moments(course, lambda row: _where_row(ledger, row))
    axis = "by forecast time" if seconds is not None else "op by op"
    caption = (
        f"Live bytes of one device, {axis}: in each of {COLUMNS} stretches the fullest moment, so the peak is exact. "
        "Below, the phase at work."
    )
    return section(
        "memory",
        "Memory over the step",
        tag("p", _peak_words(ledger)),
        legend(
            (f"c-{c}", c.replace("_", " "))
            for c in plots.STACK
            if any(m.live[CLASSES.index(c)] for m in course.moments)
        ),
        figure(
            "timeline",
            [("", pictures[0], pictures[1])],
            caption,
            walk="Walk through the step",
            said=said,
            start=course.peak,
        ),
        _classes(ledger),
        tag("h3", "What stands at the peak"),
        _held(ledger),
        tag("p", _static(ledger), class_="soft"),
    )


def _where_row(ledger: Ledger, row: int) -> str:
    at = ledger.recorded[row]
    return f"{at.phase}, {at.op}" + (f" in {clipped(at.module)}" if at.module else "")


def _peak_words(ledger: Ledger) -> str:
    memory = ledger.memory
    if not ledger.rows:
        return f"The peak is {memory.peak_bytes:,} bytes."
    row = ledger.rows[memory.peak_row]
    where = f" in {clipped(row.module)}" if row.module else ""
    largest = max(CLASSES, key=lambda c: memory.at_peak[c])
    share = format_share(memory.at_peak[largest] / max(1, memory.peak_bytes))
    return (
        f"The peak, {memory.peak_bytes:,} bytes, stands in {row.phase}, at {row.op}{where}. "
        f"Its largest class is {largest.replace('_', ' ')}, {share}."
    )


def _classes(ledger: Ledger) -> Markup:
    memory = ledger.memory
    there = [c for c in reversed(plots.STACK) if memory.at_peak[c] or memory.between_steps[c]]
    whole = max(1, memory.peak_bytes)
    rows: list[Row] = [
        [
            Cell(join((swatch(f"c-{c}"), c.replace("_", " "))), c),
            _amount(memory.at_peak[c]),
            _share(memory.at_peak[c] / whole),
            _amount(memory.between_steps[c]),
        ]
        for c in there
    ]
    between = sum(memory.between_steps.values())
    foot = [Cell("all"), _amount(memory.peak_bytes), _share(1.0, bar=False), _amount(between)]
    columns = (Column("class", number=False), Column("at the peak"), Column("share"), Column("between steps"))
    return table(
        "classes",
        "The seven classes partition the live bytes; those that are empty are left out",
        columns,
        rows,
        foot=foot,
        sort=False,
        snug=True,
    )


def _held(ledger: Ledger) -> Markup:
    found = figures.held(ledger)
    whole = max(1, ledger.memory.peak_bytes)
    shown, rest = found[:10], found[10:]
    rows: list[Row] = [
        [
            clipped(h.module) or "(outside modules)",
            Cell(join((swatch(f"c-{h.memory_class}"), h.memory_class.replace("_", " "))), h.memory_class),
            _amount(h.n_bytes),
            _share(h.n_bytes / whole),
        ]
        for h in shown
    ]
    foot: Row | None = None
    if rest:
        more = sum(h.n_bytes for h in rest)
        foot = [Cell(f"{len(rest)} smaller"), "", _amount(more), _share(more / whole, bar=False)]
    columns = (Column("module", number=False), Column("class", number=False), Column("bytes"), Column("share"))
    return table(
        "held", "Bytes alive at the peak by module and class; * stands for every number", columns, rows, foot=foot
    )


def _static(ledger: Ledger) -> str:
    book = ledger.memory.textbook
    kept = (
        ""
        if ledger.device == "cpu"
        else f" CUDA's caching allocator would hold {format_bytes(ledger.memory.reserved_bytes)}."
    )
    return (
        "The textbook's sum of parameters, layer outputs, gradients and optimizer state is "
        f"{format_bytes(book.total)}: all four at once, which no instant of the step shows.{kept}"
    )


# ---------------------------------------------------------------------------------------------------- where it all goes


def _where(s: Subject) -> Section | None:
    found = s.shares
    measures: list[tuple[str, str, Callable[[float], str]]] = [
        ("FLOPs", "flops", format_flops),
        ("bytes moved", "bytes_moved", format_bytes),
        ("bytes at the peak", "bytes_at_peak", format_bytes),
    ]
    if s.forecast is not None:
        measures.insert(0, ("roofline time", "roofline_seconds", format_seconds))
    pictures = []
    for name, field, write in measures:
        cells = figures.cells(found, field)
        what = name[:1].upper() + name[1:]
        if cells:
            wide = plots.treemap(cells, f"map-{field}-wide", write, what, width=WIDE, height=400)
            narrow = plots.treemap(cells, f"map-{field}-narrow", write, what, width=NARROW, height=420, most=30)
            pictures.append((name, wide, narrow))
    if not pictures:
        return None
    caption = (
        "Blocks alike are drawn as one, with how many they are. What an optimizer does is a part of its own; what no "
        "module does itself, such as the loss, stands outside modules."
    )
    return section(
        "where",
        "Where it goes",
        figure("map", pictures, caption, walk="Walk through the parts", switch="Area shows"),
    )


# ---------------------------------------------------------------------------------------------------------------- time


def _time(ops: Sequence[figures.Ops], forecast: Forecast) -> Section:
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
        sent = f"sent per rank, {c.ranks} ranks, {_times(c.calls, 'call')}"
        rows.append([c.op.replace("_", "-"), Cell(format_bytes(c.bytes)), sent])
    left_out = (
        f" {_times(sum(o.calls for o in silent), 'call')} without FLOPs (copies, lookups, fills) have no place here: "
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
            f"One step on {_on(forecast)}",
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


def _clock(ops: Iterable[figures.Ops]) -> str:
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
            _seconds(o.seconds),
            _share(o.seconds / whole),
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
            _seconds(time),
            _share(time / whole, bar=False),
        ]
    columns = (
        Column("op", number=False),
        Column("module", number=False, name=True),
        Column("phase", number=False, minor=True),
        Column("dtype", number=False, minor=True),
        Column("calls", minor=True),
        Column("FLOP/B", minor=True),
        Column("bound by", number=False, minor=True),
        Column(_clock(ops)),
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


# --------------------------------------------------------------------------------------------------------- measurement


def _measurement(s: Subject) -> Section | None:
    measured, found = s.measured, s.found
    if measured is None or found is None:
        return None
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
        _list([*causes, *measured.notes]) if causes or measured.notes else None,
        *_beside(found),
        tag("h3", "Where the measured time went"),
        _parts("measured-kinds", "kind", "By kind, one profiled step", found.by_kind),
        _parts("measured-modules", "module", "By module", found.by_module, search="Search measured modules"),
        tag("p", f"{found.unmatched} of {len(s.ledger)} rows were not found in the profile.", class_="soft")
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
                _seconds(p.forecast_seconds or 0.0),
                _seconds(p.span_seconds),
                Cell(("+" if p.difference >= 0 else "−") + format_seconds(abs(p.difference)), p.difference),
                _amount(p.allocated_bytes),
                _amount(p.measured_bytes) if p.measured_bytes is not None else Cell(""),
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
            _seconds(p.seconds),
            _share(p.seconds / whole),
            Cell(format_flops(p.flops) if p.flops else "", p.flops),
            Cell(
                format_rate(p.flops / p.seconds, "FLOP") if p.flops and p.seconds else "",
                p.flops / p.seconds if p.flops and p.seconds else None,
            ),
            _amount(p.moved_bytes),
        ]
        for p in parts[:CELLS]
    ]
    foot: Row | None = None
    if parts[CELLS:]:
        foot = [f"{len(parts) - CELLS} more", _seconds(sum(p.seconds for p in parts[CELLS:])), "", "", "", ""]
    columns = (
        Column(what, number=False),
        Column("seconds"),
        Column("share"),
        Column("FLOPs", minor=True),
        Column("achieved", minor=True),
        Column("bytes moved", minor=True),
    )
    return table(id_, caption, columns, rows, foot=foot, search=search)


# -------------------------------------------------------------------------------------------------------------- tables


def _modules(s: Subject) -> Section:
    timed = s.forecast is not None
    found = s.shares
    flops = sum(m.copies * m.flops for m in found) or 1
    moved = sum(m.copies * m.bytes_moved for m in found)
    at_peak = sum(m.copies * m.bytes_at_peak for m in found)
    seconds = sum(m.copies * (m.roofline_seconds or 0.0) for m in found)

    def row(name: object, key: str, copies: int, values: tuple[int, int, int, float]) -> list[Cell | str]:
        cells: list[Cell | str] = [
            Cell(name, key),
            Cell(f"{copies:,}" if copies else "", copies or None),
            Cell(format_flops(values[0]), values[0]),
            _share(values[0] / flops, bar=bool(copies)),
            _amount(values[1]),
            _amount(values[2]),
        ]
        return [*cells, _seconds(values[3])] if timed else cells

    shown, rest = found[:CELLS], found[CELLS:]
    rows = [row(clipped(label(m.module, m.copies)), clipped(m.module), m.copies, _together([m])) for m in shown]
    if rest:
        rows.append(row(f"{len(rest)} more", "", sum(m.copies for m in rest), _together(rest)))
    columns = [
        Column("module", number=False),
        Column("alike", minor=True),
        Column("FLOPs"),
        Column("share"),
        Column("bytes moved", minor=True),
        Column("at the peak", minor=True),
    ]
    if timed:
        columns.append(Column("roofline time"))
    whose = ", the whole job's FLOPs and one rank's bytes" if s.ledger.replicas > 1 else ""
    made = table(
        "module-table",
        f"Each row is a module itself, without those inside it; those alike together{whose}",
        columns,
        rows,
        foot=row("all", "", 0, (flops, moved, at_peak, seconds)),
        search="Search modules",
    )
    return section("modules", "Modules", made)


def _together(found: Iterable[Share]) -> tuple[int, int, int, float]:
    found = list(found)
    return (
        sum(m.copies * m.flops for m in found),
        sum(m.copies * m.bytes_moved for m in found),
        sum(m.copies * m.bytes_at_peak for m in found),
        sum(m.copies * (m.roofline_seconds or 0.0) for m in found),
    )


def _kinds(s: Subject) -> Section:
    ledger = s.ledger
    found = figures.kinds(s.ops)
    flops = sum(k.flops for k in found) or 1
    moved = sum(k.moved_bytes for k in found) or 1
    rows: list[Row] = []
    for k in found:
        cells: list[Cell | str] = [
            k.kind,
            Cell(f"{k.calls:,}", k.calls),
            Cell(format_flops(k.flops * ledger.replicas), k.flops),
            _share(k.flops / flops),
            _amount(k.moved_bytes),
            _share(k.moved_bytes / moved),
        ]
        rows.append([*cells, _seconds(k.seconds)] if s.forecast is not None else cells)
    columns = [
        Column("kind", number=False),
        Column("calls", minor=True),
        Column("FLOPs"),
        Column("share", minor=True),
        Column("bytes moved"),
        Column("share", minor=True),
    ]
    if s.forecast is not None:
        columns.append(Column(_clock(s.ops)))
    flop = ledger.flops
    phases = [
        ("forward", flop.forward),
        ("backward", flop.backward),
        ("recompute", flop.recompute),
        ("optimizer", flop.optimizer),
    ]
    kind_of = "matmul, attention and conv; the optimizer's of every kind"
    phase_rows: list[Row] = [[name, Cell(format_flops(n), n)] for name, n in phases if n]
    rule = flop.six_p_tokens
    beside = (
        f"Model FLOPs are forward + backward, {s.least}{format_flops(flop.model)}. The rule of thumb "
        f"6 × parameters × tokens gives {format_flops(rule)} ({rule / flop.model - 1:+.1%})."
        if flop.model
        else ""
    )
    attention = (
        f" Attention is counted as far as its masks let through, {format_flops(flop.attention)}; full-square it would "
        f"be {format_flops(flop.attention_full_square)}."
        if flop.attention
        else ""
    )
    return section(
        "kinds",
        "Kinds and phases",
        table("kind-table", "Every op of the step by kind", columns, rows),
        table(
            "phase-table",
            f"FLOPs by phase: {kind_of}",
            (Column("phase", number=False), Column("FLOPs")),
            phase_rows,
            snug=True,
        ),
        tag("p", beside + attention),
    )


def _gradients(ledger: Ledger) -> Section:
    found = layers(ledger)
    rows: list[Row] = [
        [
            clipped(x.module) or "(model)",
            Cell(clipped(x.shapes)),
            Cell(x.formula),
            Cell(format_flops(x.forward), x.forward),
            Cell(format_flops(x.d_input) if x.d_input else "none", x.d_input),
            Cell(format_flops(x.d_weight) if x.d_weight else "none", x.d_weight),
        ]
        for x in found[:CELLS]
    ]
    columns = (
        Column("layer", number=False),
        Column("forward product", number=False, minor=True),
        Column("formula", number=False, minor=True),
        Column("forward"),
        Column("dX"),
        Column("dW"),
    )
    cut = f"; {len(found) - CELLS} more stand in --json" if len(found) > CELLS else ""
    return section(
        "gradients",
        "Gradients",
        table("gradient-table", f"What each layer's products cost{cut}", columns, rows, search="Search layers"),
    )


def _uncounted(ledger: Ledger) -> Section | None:
    found = ledger.uncounted
    if not found:
        return None
    rows: list[Row] = [[u.op, Cell(f"{u.calls:,}", u.calls), _amount(u.bytes)] for u in found[:CELLS]]
    return section(
        "uncounted",
        "Uncounted ops",
        tag("p", "These have no rule: their FLOPs are unknown, so totals say at least. Their bytes are counted."),
        table(
            "uncounted-table",
            "Ops without a rule",
            (Column("op", number=False), Column("calls"), Column("bytes")),
            rows,
        ),
        tag("p", "To count them, put such a rule where your model is defined, and import bursar there:"),
        *(tag("pre", tag("code", join(u.fix.splitlines(), "\n"))) for u in found[:10]),
    )


def _assumptions(s: Subject) -> Section:
    known: Mapping[str, None] = dict.fromkeys(
        (*s.ledger.assumptions, *(s.forecast.assumptions if s.forecast is not None else ()))
    )
    return section("assumptions", "Assumptions", _list(known) if known else tag("p", "None."))


def _list(lines: Iterable[str]) -> Markup:
    return tag("ul", *(tag("li", words) for words in lines), class_="plain")


def _footer(ledger: Ledger) -> Markup:
    versions = ", ".join(f"{name} {version}" for name, version in ledger.versions.items())
    partial = " The trace ended early: this is what it had seen." if ledger.partial else ""
    return tag(
        "footer",
        tag(
            "p",
            f"Counted on tensors without data, no GPU needed. Made with {versions or 'bursar'}.{partial} "
            "GB = 10⁹ bytes; a multiply and an add are two FLOPs.",
            class_="soft",
        ),
    )


def _amount(n_bytes: int) -> Cell:
    return Cell(format_bytes(n_bytes), n_bytes)


def _seconds(seconds: float) -> Cell:
    return Cell(format_seconds(seconds) if seconds else "0 s", seconds)


def _share(share: float, bar: bool = True) -> Cell:
    return Cell(join((format_share(share), plots.share_bar(share) if bar else None)), share)


def _times(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "es" if what.endswith("ch") else "s")
