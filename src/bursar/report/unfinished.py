"""Page and JSON of a measurement that came to no end: what was measured until then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bursar.ledger import Ledger
from bursar.report.record import SCHEMA_VERSION
from bursar.report.text import line, table
from bursar.unfinished import Unfinished, lines
from bursar.units import format_bytes, format_flops

_WRITE: dict[str, Callable[[float], str]] = {"FLOP": format_flops, "B": format_bytes}


def record(ledger: Ledger, unfinished: Unfinished) -> dict[str, Any]:
    """As the record of a whole measurement, with ``partial`` and why; what was not measured is not there."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model": ledger.model.name,
        "partial": True,
        "balances": None,
        "failed": {
            "kind": unfinished.kind,
            "reason": unfinished.reason,
            "where": unfinished.where or None,
            "steps": unfinished.steps,
        },
        "lines": [
            {"what": x.what, "unit": x.unit, "predicted": x.predicted, "measured": x.measured, "error": x.error,
             "tolerance": x.tolerance, "balances": x.balances}
            for x in lines(ledger, unfinished)
        ],
        "assumptions": list(ledger.assumptions),
        "versions": dict(ledger.versions),
    }  # fmt: skip


def render(ledger: Ledger, unfinished: Unfinished) -> Iterator[Any]:
    """The figures there are."""
    found = lines(ledger, unfinished)
    yield line(f"{ledger.model.name}: the measurement ended in step {unfinished.steps + 1}", style="bold")
    if not found:
        yield line("Nothing was measured by then; the forecast stands.")
        return
    yield table(
        "",
        ("", "forecast", "measured", "error"),
        [
            (x.what, _WRITE[x.unit](x.predicted), _WRITE[x.unit](x.measured),
             "equal" if x.predicted == x.measured else f"{x.error:+.2%}")
            for x in found
        ],
    )  # fmt: skip
