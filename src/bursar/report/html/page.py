"""The report of a step: one file that opens from disk, works without its script and asks nothing of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from bursar.ledger import Ledger
from bursar.memory import CLASSES
from bursar.modules import Share, label, shares
from bursar.reconcile import Measured, Reconciliation
from bursar.report import figures
from bursar.report.gradients import layers
from bursar.report.html import books, plots, seconds
from bursar.report.html.markup import Markup, clipped, document, join, tag
from bursar.report.html.parts import (
    CELLS,
    NARROW,
    WIDE,
    Cell,
    Column,
    Row,
    Section,
    amount,
    bullets,
    contents,
    device_of,
    duration,
    figure,
    headline,
    legend,
    section,
    share,
    swatch,
    table,
    times,
)
from bursar.roofline import Forecast
from bursar.units import format_bytes, format_count, format_flops, format_seconds, format_share

COLUMNS = 360  # of the timeline: more than a phone's pixels, and a step of 6000 ops stays under 100 kB


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
    where = f" on {device_of(forecast)}" if forecast else ""
    return document(f"{ledger.model.name or 'A step'}{where}: what one training step costs", body)


def _sections(s: Subject) -> Iterator[Section | None]:
    yield _memory(s)
    yield _where(s)
    if s.forecast is not None:
        yield seconds.section_of(s.ops, s.forecast)
    if s.measured is not None and s.found is not None:
        yield books.section_of(s.ledger, s.measured, s.found)
    yield _modules(s)
    yield _kinds(s)
    if s.gradients:
        yield _gradients(s.ledger)
    yield _uncounted(s.ledger)
    yield _assumptions(s)


# -------------------------------------------------------------------------------------------------------------- header


def _header(s: Subject) -> Markup:
    ledger, forecast = s.ledger, s.forecast
    model, step, flops, peak = ledger.model, ledger.step, ledger.flops, ledger.memory.peak_bytes
    size = (
        f"{format_count(model.parameters)} parameters, {times(step.samples, 'sample')} = "
        f"{times(step.tokens, 'token')} in {times(step.micro_batches, 'micro-batch')}"
    )
    where = (
        f"on {device_of(forecast)}" if forecast else "on the CPU" if ledger.device == "cpu" else "on a GPU in general"
    )
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
            amount(memory.at_peak[c]),
            share(memory.at_peak[c] / whole),
            amount(memory.between_steps[c]),
        ]
        for c in there
    ]
    between = sum(memory.between_steps.values())
    foot = [Cell("all"), amount(memory.peak_bytes), share(1.0, bar=False), amount(between)]
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
            amount(h.n_bytes),
            share(h.n_bytes / whole),
        ]
        for h in shown
    ]
    foot: Row | None = None
    if rest:
        more = sum(h.n_bytes for h in rest)
        foot = [Cell(f"{len(rest)} smaller"), "", amount(more), share(more / whole, bar=False)]
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
            share(values[0] / flops, bar=bool(copies)),
            amount(values[1]),
            amount(values[2]),
        ]
        return [*cells, duration(values[3])] if timed else cells

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
            share(k.flops / flops),
            amount(k.moved_bytes),
            share(k.moved_bytes / moved),
        ]
        rows.append([*cells, duration(k.seconds)] if s.forecast is not None else cells)
    columns = [
        Column("kind", number=False),
        Column("calls", minor=True),
        Column("FLOPs"),
        Column("share", minor=True),
        Column("bytes moved"),
        Column("share", minor=True),
    ]
    if s.forecast is not None:
        columns.append(Column(seconds.clock(s.ops)))
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
    rows: list[Row] = [[u.op, Cell(f"{u.calls:,}", u.calls), amount(u.bytes)] for u in found[:CELLS]]
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
    return section("assumptions", "Assumptions", bullets(known) if known else tag("p", "None."))


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
