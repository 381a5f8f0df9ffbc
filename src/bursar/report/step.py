"""The page of ``bursar step``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bursar.ledger import Ledger, module_totals
from bursar.memory import CLASSES
from bursar.report.gradients import layers
from bursar.report.text import line, table
from bursar.roofline import Forecast
from bursar.units import format_bytes, format_count, format_flops, format_rate, format_seconds, format_share

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
    yield from _memory(ledger)
    if forecast is not None:
        yield from _time(forecast, explain)
    yield from _modules(ledger, forecast)
    if flops.uncounted:
        yield table(
            "Uncounted: ops without a rule; their FLOPs are unknown, so totals say at least",
            ("op", "calls", "bytes"),
            [(u.op, str(u.calls), format_bytes(u.bytes)) for u in flops.uncounted],
        )
    if explain:
        yield from _explain(ledger, forecast)
    yield line("Assumptions", style="bold")
    for note in (*ledger.assumptions, *(forecast.assumptions if forecast else ())):
        yield line(f"  {note}")
    if forecast is None and on != "cpu":
        yield line("  no --on, so no time: the ops are a GPU's; try --on h100-sxm (bursar hardware lists them)")


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


def _memory(ledger: Ledger) -> Iterator[Any]:
    memory, book = ledger.memory, ledger.memory.textbook
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
        yield line(f"  The peak stands in {row.phase}, at {row.op}{where}; the largest there:")
        for held in memory.holdings[:3]:
            yield line(f"    {_bytes(held.n_bytes)}  {held.memory_class.replace('_', ' ')}  {held.module or held.op}")
    if ledger.device == "gpu":
        yield line(f"  The caching allocator would hold {_bytes(memory.reserved_bytes)}.")
    parts = (("parameters", book.parameters), ("layer outputs", book.activations), ("gradients", book.gradients),
             ("optimizer state", book.optimizer_state))  # fmt: skip
    yield table(
        "The notes' static sum (all four at once, which no instant of a real step shows)",
        ("", "bytes", "elements", "share"),
        [
            *((name, _bytes(n), _elements(ledger, n), format_share(n / max(1, book.total), 2)) for name, n in parts),
            ("total", _bytes(book.total), _elements(ledger, book.total), ""),
        ],
    )


def _time(forecast: Forecast, explain: bool) -> Iterator[Any]:
    cluster = forecast.cluster
    known = forecast.bound_by
    binds = max(("compute", "memory", "network"), key=lambda k: known[k])
    answer = "fits" if forecast.fits else "does not fit"
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
            ("memory", answer, f"{format_bytes(forecast.peak_bytes)} of {format_bytes(forecast.usable_bytes)} usable"),
        ],
    )  # fmt: skip
    for c in forecast.collectives:
        yield line(f"  {c.op} over {c.ranks} ranks: {format_bytes(c.bytes)} sent per rank in {_times(c.calls, 'call')}")


def _modules(ledger: Ledger, forecast: Forecast | None) -> Iterator[Any]:
    totals = module_totals(ledger.recorded, depth=2)
    rows = []
    for path, t in totals.items():
        done = t["forward"] + t["backward"] + t["recompute"]
        rows.append((path or "(outside modules)", done, t["bytes"]))
    rows.sort(key=lambda r: (-r[1], -r[2]))  # stable: equals stay in the order of forward
    shown = rows[:12]
    total = sum(r[1] for r in rows) or 1
    body = [(p, _flops(f), format_share(f / total), _bytes(b)) for p, f, b in shown]
    rest = rows[len(shown) :]
    if rest:
        f, b = sum(r[1] for r in rest), sum(r[2] for r in rest)
        body.append((f"{len(rest)} more", _flops(f), format_share(f / total), _bytes(b)))
    body.append(("total", _flops(sum(r[1] for r in rows)), "", _bytes(sum(r[2] for r in rows))))
    yield table("By module (forward, backward, recompute)", ("module", "FLOPs", "share", "bytes moved"), body)


def _explain(ledger: Ledger, forecast: Forecast | None) -> Iterator[Any]:
    flops = ledger.flops
    yield line("Where the figures come from", style="bold")
    yield line(f"  model FLOPs = Σ over the {len(ledger)} ops: matmul, attention, conv, forward and backward (counted)")
    yield line(
        f"  6PT = 6 × {ledger.model.active_parameters} parameters × {ledger.step.tokens} tokens "
        "(rule of thumb; Kaplan et al. 2020, section 2.1)"
    )
    yield line(f"  memory = live bytes of {len(ledger.storages)} storages, from allocation to last reference (counted)")
    if forecast is None:
        return
    device = forecast.cluster.accelerator
    for dtype in flops.by_dtype:
        if dtype in device.peak_flops_per_s:
            yield line(
                f"  peak {dtype} = {format_rate(device.peak_flops_per_s[dtype], 'FLOP')} dense: "
                f"{device.sources.get('peak_flops_per_s', '')}"
            )
    bandwidth, source = device.memory_bytes_per_s, device.sources.get("memory_bytes_per_s", "")
    yield line(f"  bandwidth = {format_rate(bandwidth, 'B')}: {source}")
    yield line(
        "  roofline = Σ over ops of max(FLOPs / peak, bytes / bandwidth); MFU = Σ FLOPs / peak ÷ expected seconds"
    )


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
