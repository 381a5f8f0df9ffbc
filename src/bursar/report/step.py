"""The page of ``bursar step``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bursar.architecture import Transformer, preset
from bursar.errors import BursarError
from bursar.ledger import Ledger, Part, parts
from bursar.memory import CLASSES
from bursar.report.catalogues import twelve
from bursar.report.gradients import layers
from bursar.report.text import line, note, sparkline, table
from bursar.roofline import Forecast
from bursar.units import format_bytes, format_count, format_flops, format_rate, format_seconds, format_share
from bursar.workspaces import workspaces

_MODULES_SHOWN = 12
_SMALL = 10**5  # below this a count is printed whole: the notes' examples are to be recognised


def render(
    ledger: Ledger, forecast: Forecast | None, *, on: str | None, gradients: bool = False, explain: bool = False
) -> Iterator[Any]:
    """Headline, FLOPs, memory, time, modules, assumptions; each part a renderable."""
    flops = ledger.flops
    micro = _times(ledger.step.micro_batches, "micro-batch")
    yield line(
        f"{ledger.model.name}: {format_count(ledger.model.parameters)} parameters, "
        f"{_times(ledger.step.samples, 'sample')} = {_times(ledger.step.tokens, 'token')} in {micro}",
        style="bold",
    )
    least = "at least " if flops.uncounted else ""
    rows = [
        ("forward", least + _flops(flops.forward), _rule(flops.forward, 2, ledger)),
        ("backward", least + _flops(flops.backward), _rule(flops.backward, 4, ledger)),
        ("model = forward + backward", least + _flops(flops.model), _rule(flops.model, 6, ledger)),
    ]
    if flops.recompute:
        rows.append(("recompute", _flops(flops.recompute), f"hardware FLOPs {_flops(flops.hardware)}"))
    trained = ledger.model.trainable_parameters * ledger.replicas
    rows.append(("optimizer", _flops(flops.optimizer), _per(flops.optimizer, trained, "per parameter")))
    if flops.attention:
        rows.append(("attention", _flops(flops.attention), f"full-square {_flops(flops.attention_full_square)}"))
    products = format_share(_products(ledger) / max(1, flops.total))
    rows.append(("all kinds", least + _flops(flops.total), f"matmul, attention, conv {products}"))
    yield table("FLOPs of one step (a multiply and an add are two)", ("", "FLOPs", ""), rows)
    if gradients:
        yield gradients_table(ledger)
        yield gradients_rules(ledger)
    yield from _memory(ledger, forecast)
    if forecast is not None:
        yield from _time(forecast)
    yield from _modules(ledger)
    if flops.uncounted:
        yield table(
            "Uncounted: ops without a rule; their FLOPs are unknown, so totals say at least",
            ("op", "calls", "bytes"),
            [(u.op, str(u.calls), format_bytes(u.bytes)) for u in flops.uncounted],
        )
        yield line("To count them, put such a rule where your model is defined, and import bursar there:")
        for u in flops.uncounted:
            yield from map(line, u.fix.splitlines())
    if explain:
        yield from _explain(ledger, forecast)
    yield line("Assumptions", style="bold")
    for text in (*ledger.assumptions, *(forecast.assumptions if forecast else ())):
        yield note(text)
    if forecast is None and on != "cpu":
        yield note("no --on, so no time: the ops are a GPU's; try --on h100-sxm (bursar hardware lists them)")


def gradients_table(ledger: Ledger) -> Any:
    """The notes' table of chapter 8."""
    rows = [
        (x.module or "(model)", x.shapes, x.formula, _flops(x.forward), _flops(x.d_input) if x.d_input else "none",
         _flops(x.d_weight) if x.d_weight else "none")
        for x in layers(ledger)
    ]  # fmt: skip
    return table(
        "Gradients: what each layer's products cost",
        ("layer", "forward product", "formula", "forward", "dX", "dW"),
        rows,
        left=3,
    )


def gradients_rules(ledger: Ledger) -> Any:
    """2BP, 4BP and 6BP beside the counts, and what backward would cost if the input wanted a gradient too."""
    flops, b_p = ledger.flops, ledger.model.parameters * ledger.step.tokens
    missing = sum(x.forward - x.d_input for x in layers(ledger) if x.d_weight and not x.d_input)
    with_input = flops.backward + missing
    return table(
        "The rules beside the counts (B tokens, P parameters)",
        ("", "rule", "by the rule", "counted", "if the input wants a gradient"),
        [
            ("forward", "2BP", _flops(2 * b_p), _flops(flops.forward), _flops(flops.forward)),
            ("backward", "4BP", _flops(4 * b_p), _flops(flops.backward), _flops(with_input)),
            ("step", "6BP", _flops(6 * b_p), _flops(flops.model), _flops(flops.forward + with_input)),
        ],
        left=2,
    )


def _memory(ledger: Ledger, forecast: Forecast | None) -> Iterator[Any]:
    memory = ledger.memory
    yield table(
        "Memory of one device",
        ("", "at the peak", "share", "between steps"),
        [
            *(
                (c.replace("_", " "), _bytes(peak), format_share(peak / max(1, memory.peak_bytes)), _bytes(between))
                for c in CLASSES
                if (peak := memory.at_peak[c]) | (between := memory.between_steps[c])
            ),
            ("peak", _bytes(memory.peak_bytes), "", _bytes(sum(memory.between_steps.values()))),
        ],
    )  # fmt: skip
    row = ledger.rows[memory.peak_row] if ledger.rows else None
    if row is not None:
        where = f" in {row.module}" if row.module else ""
        yield note(f"The peak stands in {row.phase}, at {row.op}{where}; the largest there:")
        for x in memory.holdings[:3]:
            yield line(f"    {_bytes(x.n_bytes)}  {x.memory_class.replace('_', ' ')}  {x.module or x.op}")
    if ledger.device == "gpu":
        held = memory.held
        yield note(
            f"The caching allocator would show {_bytes(held.allocated_bytes)} allocated and hold "
            f"{_bytes(held.reserved_bytes)} in {held.segments} segments."
        )
    for w in workspaces(ledger, forecast.cluster) if forecast is not None else ():
        yield note(f"Beside the peak: {_bytes(w.n_bytes)} for {w.name} ({w.source}).")
    yield from _timeline(ledger)
    yield from _static(ledger)


_COLUMNS = 48  # of the timeline and the bars
_FILLS = "█▓▒░"


def _timeline(ledger: Ledger) -> Iterator[Any]:
    """Each class's live bytes over the step, and which phase is at work."""
    course = ledger.memory.course(_COLUMNS)
    most = {c: max(course[c]) for c in CLASSES}
    phases = " " + "".join(ledger.rows[row].phase[0] for row in course["row"][1:-1])
    yield line("")
    yield line("Live bytes over the step, op by op", style="bold")
    width = max(len(c) for c in CLASSES)
    for c in CLASSES:
        if most[c]:
            bars = "".join(
                bar if n else " "
                for bar, n in zip(sparkline(course[c], 0, most[c], width=_COLUMNS), course[c], strict=True)
            )
            yield line(f"  {c.replace('_', ' '):<{width}} {bars} {_bytes(most[c])}")
    yield line(f"  {'':<{width}} {phases}")
    yield note("each to its own most, on the right; blank is none; the first column is before the step, the last after "
               "zero_grad. f forward, b backward, r recompute, o optimizer")  # fmt: skip


def _static(ledger: Ledger) -> Iterator[Any]:
    """The notes' sum in both conventions: activations as the layers' outputs, and as what autograd saves."""
    book, saved = ledger.memory.textbook, ledger.memory.saved_activations
    with_saved = book.total - book.activations + saved

    def row(name: str, n: int, outputs: bool, saves: bool) -> tuple[str, ...]:
        share = format_share(n / max(1, book.total), 2) if outputs else ""
        return name, _bytes(n), _elements(ledger, n), share, format_share(n / max(1, with_saved), 2) if saves else ""

    yield line("")
    yield table(
        "The notes' static sum (all four at once, which no instant of a real step shows)",
        ("", "bytes", "elements", "share", "with saved"),
        [
            row("parameters", book.parameters, True, True),
            row("layer outputs", book.activations, True, False),
            row("or saved activations", saved, False, True),
            row("gradients", book.gradients, True, True),
            row("optimizer state", book.optimizer_state, True, True),
            ("total", _bytes(book.total), _elements(ledger, book.total), format_share(1, 2), ""),
            ("total with saved", _bytes(with_saved), _elements(ledger, with_saved), "", format_share(1, 2)),
        ],
    )
    for name, activations in (("layer outputs", book.activations), ("saved", saved)):
        parts = (book.parameters, activations, book.gradients, book.optimizer_state)
        yield line(f"  {name:<15} {_pie(parts)}")
    legend = zip(_FILLS, ("parameters", "activations", "gradients", "optimizer state"), strict=True)
    yield note("   ".join(f"{fill} {name}" for fill, name in legend))
    shape = _transformer(ledger)
    if shape is not None:
        yield note(twelve(shape))
    yield line("")


def _pie(parts: Sequence[int]) -> str:
    """The parts as one bar: cells are rounded so that they add up to the whole."""
    total, before, found = max(1, sum(parts)), 0, ""
    for fill, n in zip(_FILLS, parts, strict=True):
        found += fill * (round((before + n) * _COLUMNS / total) - round(before * _COLUMNS / total))
        before += n
    return found


def _transformer(ledger: Ledger) -> Transformer | None:
    """The catalogue's shape, where the model is one of its transformers."""
    try:
        shape = preset(ledger.model.name)
    except BursarError:
        return None
    return shape if isinstance(shape, Transformer) and shape.parameters() == ledger.model.parameters else None


def _time(forecast: Forecast) -> Iterator[Any]:
    cluster = forecast.cluster
    known = forecast.bound_by
    binds = max(("compute", "memory", "network"), key=lambda k: known[k])
    answer = "fits" if forecast.fits else "does not fit"
    room = f"{format_bytes(forecast.peak_bytes)} of {format_bytes(forecast.usable_bytes)} usable"
    room += " each" if cluster.count > 1 else ""
    interval = f"{format_seconds(forecast.lower_seconds)} … {format_seconds(forecast.upper_seconds)}"
    utilisation = f"full-square {format_share(forecast.mfu_full_square)}, HFU {format_share(forecast.hfu)}"
    yield table(
        f"On {cluster.count} × {cluster.accelerator.title}",
        ("", "", ""),
        [
            ("expected", format_seconds(forecast.seconds), f"{interval}, {forecast.basis}"),
            ("roofline bound", format_seconds(forecast.roofline_seconds), f"mostly {binds}"),
            ("MFU", format_share(forecast.mfu), utilisation),
            *((f"bound by {k}", format_seconds(v), format_share(v / forecast.seconds)) for k, v in known.items() if v),
            ("memory", answer, room),
        ],
    )  # fmt: skip
    for c in forecast.collectives:
        yield note(f"{c.op} over {c.ranks} ranks: {format_bytes(c.bytes)} sent per rank in {_times(c.calls, 'call')}")
    if forecast.collectives:
        yield line("")


def _modules(ledger: Ledger) -> Iterator[Any]:
    found = sorted(parts(ledger.recorded), key=lambda p: (-p.copies * p.flops, -p.copies * p.bytes))  # stable
    flops, moved = sum(p.copies * p.flops for p in found), sum(p.copies * p.bytes for p in found)
    shown, rest = found[:_MODULES_SHOWN], found[_MODULES_SHOWN:]
    if rest:
        shown.append(
            Part(f"{len(rest)} more", 1, sum(p.copies * p.flops for p in rest), sum(p.copies * p.bytes for p in rest))
        )
    body = [
        (
            (p.module or "(outside modules)") + (f"  {p.copies} alike, each" if p.copies > 1 else ""),
            _flops(p.flops),
            format_share(p.copies * p.flops / max(1, flops)) + (" together" if p.copies > 1 else ""),
            _bytes(p.bytes),
        )
        for p in shown
    ]
    body.append(("total", _flops(flops), "", _bytes(moved)))
    whose = ", one rank's share" if ledger.replicas > 1 else ""
    yield table(f"By module (forward, backward, recompute{whose})", ("module", "FLOPs", "share", "bytes moved"), body)


def _explain(ledger: Ledger, forecast: Forecast | None) -> Iterator[Any]:
    flops = ledger.flops
    yield line("Where the figures come from", style="bold")
    yield note(f"model FLOPs = Σ over the {len(ledger)} ops: matmul, attention, conv, forward and backward (counted)")
    yield note(
        f"6PT = 6 × {ledger.model.active_parameters} parameters × {ledger.step.tokens} tokens "
        "(rule of thumb; Kaplan et al. 2020, section 2.1)"
    )
    yield note(f"memory = live bytes of {len(ledger.storages)} storages, from allocation to last reference (counted)")
    if forecast is None:
        return
    device = forecast.cluster.accelerator
    for dtype in flops.by_dtype:
        if dtype in device.peak_flops_per_s:
            yield note(
                f"peak {dtype} = {format_rate(device.peak_flops_per_s[dtype], 'FLOP')} dense: "
                f"{device.sources.get('peak_flops_per_s', '')}"
            )
    bandwidth, source = device.memory_bytes_per_s, device.sources.get("memory_bytes_per_s", "")
    yield note(f"bandwidth = {format_rate(bandwidth, 'B')}: {source}")
    yield note("roofline = Σ over ops of max(FLOPs / peak, bytes / bandwidth); MFU = Σ FLOPs / peak ÷ expected seconds")


def _flops(n: int) -> str:
    return f"{n} FLOP" if n < _SMALL else format_flops(n)


def _bytes(n: int) -> str:
    return f"{n} B" if n < _SMALL else format_bytes(n)


def _elements(ledger: Ledger, n_bytes: int) -> str:
    size = ledger.textbook.parameters // max(1, ledger.model.parameters)
    return f"{n_bytes // size}" if n_bytes < _SMALL and size and n_bytes % size == 0 else ""


def _products(ledger: Ledger) -> int:
    return sum(ledger.flops.by_kind[k] for k in ("matmul", "attention", "conv"))


def _error(rule: int, counted: int) -> str:
    return f"{rule / counted - 1:+.1%}" if counted else "n/a"


def _rule(counted: int, factor: int, ledger: Ledger) -> str:
    by_rule = factor * ledger.model.active_parameters * ledger.step.tokens  # P parameters, T tokens
    return f"{factor}PT by the rule {_flops(by_rule)} ({_error(by_rule, counted)})"


def _per(n: int, of: int, what: str) -> str:
    return f"{n / of:.3g} {what}" if of else ""


def _times(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "es" if what.endswith("ch") else "s")
