"""A step as files: each form one function, chosen by its name or by the file's suffix."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bursar.errors import BadInput, UnknownName, printable
from bursar.ledger import Ledger
from bursar.roofline import Forecast

Write = Callable[[Ledger, "Forecast | None", Path, Mapping[str, Any]], None]


def _html(ledger: Ledger, forecast: Forecast | None, path: Path, more: Mapping[str, Any]) -> None:
    from bursar.report.html.page import render

    path.write_text(render(ledger, forecast, **more), encoding="utf-8")


def _perfetto(ledger: Ledger, forecast: Forecast | None, path: Path, more: Mapping[str, Any]) -> None:
    from bursar.report.perfetto import trace

    path.write_text(json.dumps(trace(ledger, forecast), separators=(",", ":"), allow_nan=False), encoding="utf-8")


def _parquet(ledger: Ledger, forecast: Forecast | None, path: Path, more: Mapping[str, Any]) -> None:
    ledger.ops.write_parquet(path)


def _csv(ledger: Ledger, forecast: Forecast | None, path: Path, more: Mapping[str, Any]) -> None:
    path.write_text(table(ledger), encoding="utf-8", newline="")


def _markdown(ledger: Ledger, forecast: Forecast | None, path: Path, more: Mapping[str, Any]) -> None:
    from bursar.report.markdown import step

    path.write_text(step(ledger, forecast), encoding="utf-8")


def _snapshot(ledger: Ledger, forecast: Forecast | None, path: Path, more: Mapping[str, Any]) -> None:
    from bursar.report.snapshot import dumps

    path.write_bytes(dumps(ledger, forecast))


def _plot(ledger: Ledger, forecast: Forecast | None, path: Path, more: Mapping[str, Any]) -> None:
    from bursar.report import plot

    if path.suffix == ".png":
        plot.png(ledger, forecast, path)
    else:
        path.write_text(plot.svg(ledger, forecast), encoding="utf-8")


FORMS: Mapping[str, tuple[tuple[str, ...], Write]] = {
    "html": ((".html", ".htm"), _html),
    "perfetto": ((".json",), _perfetto),
    "parquet": ((".parquet",), _parquet),
    "csv": ((".csv",), _csv),
    "markdown": ((".md",), _markdown),
    "snapshot": ((".pickle", ".pkl"), _snapshot),
    "plot": ((".svg", ".png"), _plot),
}


def check(form: str, path: Path) -> None:
    """Raise BadInput where ``path`` cannot be written or is not of ``form``: before a trace, not after it."""
    if path.is_dir():
        raise BadInput(f"{path} is a folder; give a file in it")
    if not path.absolute().parent.is_dir():
        raise BadInput(f"{path} cannot be written: there is no folder {path.parent}; make it first")
    if form == "plot" and path.suffix not in FORMS[form][0]:
        raise BadInput(f"no plot can be drawn as {path.name!r}; give a name that ends in .svg or .png")


def write(form: str, ledger: Ledger, forecast: Forecast | None, path: Path, **more: Any) -> None:
    """``ledger``'s step at ``path`` in one of FORMS; ``more`` goes to the HTML page. BadInput if it cannot be."""
    if form not in FORMS:
        raise UnknownName("form of a step", form, FORMS)
    check(form, path)
    try:
        FORMS[form][1](ledger, forecast, path, more if form == "html" else {})
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror or error}") from error


def form_of(path: Path) -> str:
    """The form that a suffix stands for. Raises BadInput naming those there are."""
    for form, (suffixes, _) in FORMS.items():
        if path.suffix.lower() in suffixes:
            return form
    known = ", ".join(f"{suffixes[0]} ({form})" for form, (suffixes, _) in FORMS.items())
    raise BadInput(f"no form of a step is called {path.suffix or path.name!r}; known: {known}")


# ----------------------------------------------------------------------------------------------------------------- CSV

_COLUMNS = (
    "seq",
    "phase",
    "kind",
    "op",
    "module",
    "dtype",
    "flops",
    "recompute_flops",
    "read_bytes",
    "written_bytes",
    "allocated_bytes",
    "shapes",
)


def table(ledger: Ledger) -> str:
    """The ledger as CSV (RFC 4180), one row per op; of an op without a rule the FLOPs are empty, not 0."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(_COLUMNS)
    writer.writerows(_rows(ledger))
    return out.getvalue()


def _rows(ledger: Ledger) -> Iterator[list[str | int]]:
    for i, row in enumerate(ledger.recorded):
        work = row.work
        known = row.kind != "uncounted"
        yield [
            i,
            cell(row.phase),
            cell(row.kind),
            cell(row.op),
            cell(row.module),
            cell(row.dtype),
            work.flops if known else "",
            work.recompute_flops if known else "",
            work.read_bytes,
            work.written_bytes,
            row.allocated_bytes,
            " ".join("x".join(map(str, s)) or "scalar" for s in row.shapes),
        ]


def cell(text: str) -> str:
    r"""``text`` for a spreadsheet, which takes what begins with = + - @ for a formula: such a cell begins with a quote.

    Control characters are written out. Source: OWASP, "CSV Injection".

    >>> cell("=cmd|' /C calc'!A0"), cell("layers.0"), cell("\x1b")
    ("'=cmd|' /C calc'!A0", 'layers.0', '\\x1b')
    """
    plain = printable(text, keep="")
    begins = plain.lstrip()[:1]
    return f"'{plain}" if begins and begins in "=+-@＝＋－＠" else plain
