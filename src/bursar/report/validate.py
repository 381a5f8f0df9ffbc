"""The scoreboard: record, page and Markdown of ``bursar validate``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from bursar.plan.validate import Line, Scoreboard
from bursar.report.text import line, table

_ERRORS = ("mape", "mape_with_skipped", "median", "p90", "bias", "within_10")


def record(board: Scoreboard) -> dict[str, Any]:
    """The JSON of ``validate``: errors as fractions, null where nothing can be said."""
    return {
        "schema_version": 1,
        "tables": [dataclasses.asdict(found) for found in board.lines],
        "coverage_80": board.coverage,
    }


def page(board: Scoreboard, source: str) -> Iterator[Any]:
    """The scoreboard for a terminal."""
    yield line(f"Forecasts of published runs in {source}, each from its configuration alone")
    for title, columns, rows in _tables(board):
        yield table(title, columns, rows)
    yield from (line(f"  {text}") for text in _legend(board))


def markdown(board: Scoreboard, source: str, versions: str) -> str:
    """The same as a page of the docs."""
    out = [
        "# Scoreboard",
        "",
        f"Written by `bursar validate {source} --markdown docs/scoreboard.md` ({versions}). Each row of the tables was",
        "forecast from its configuration alone.",
    ]
    for title, columns, rows in _tables(board):
        out += ["", f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        out += ["| " + " | ".join(cell or " " for cell in row) + " |" for row in rows]
    out += ["", *(f"- {text}" for text in _legend(board))]
    skipped = [(x, why, n) for x in board.lines for why, n in x.reasons.items() if why != "the source prints none"]
    if skipped:
        out += ["", "## Skipped", "", "| table | target | rows | why |", "|---|---|---|---|"]
        out += [f"| {x.table} | {x.target} | {n} | {why} |" for x, why, n in skipped]
    return "\n".join(out) + "\n"


def _tables(board: Scoreboard) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    errors = ("table", "rows", "skip", "MAPE", "w. skip", "median", "p90", "bias", "≤10 %")
    beside = ("table", "in 80 %", "Winkler", "scaled", "floor", "peer")
    for target, title in (("step_time", "Step time"), ("peak_memory", "Peak memory"),
                          ("steady_memory", "Memory between steps")):  # fmt: skip
        lines = [x for x in board.lines if x.target == target]
        if not lines:
            continue
        yield title, errors, [(x.table, str(x.rows), str(x.skipped), *_percents(x, *_ERRORS)) for x in lines]
        yield (
            f"{title}: interval, one scale per GPU, floor and best peer",
            beside,
            [
                (
                    x.table,
                    _percent(x.coverage_80),
                    _plain(x.winkler),
                    *_percents(x, "scaled_mape", "floor_mape"),
                    x.peer,
                )
                for x in lines
            ],
        )
    fits: list[tuple[str, ...]] = [(x.table, str(x.rows), str(x.skipped), _percent(x.within_10), _caught(x), x.peer)
            for x in board.lines if x.target == "fits"]  # fmt: skip
    if fits:
        yield "Fits", ("table", "rows", "skip", "right", "out of memory caught", "peer"), fits
    ranked: list[tuple[str, ...]] = [(x.table, str(x.rows), str(x.skipped), _plain(x.kendall_tau), _percent(x.regret))
              for x in board.lines if x.target == "ranking" and x.kendall_tau is not None]  # fmt: skip
    if ranked:
        yield "Ranking of layouts", ("table", "rows", "skip", "Kendall τ", "regret"), ranked


def _legend(board: Scoreboard) -> list[str]:
    faster = [f"{x.table} {x.impossible}" for x in board.lines if x.impossible]
    inside = ", ".join(f"{target} {share:.0%}" for target, share in board.coverage.items())
    return [
        "MAPE: mean absolute error; bias: mean signed error, forecast over measured; ≤10 %: share of rows so close.",
        "w. skip: MAPE where a row that could be scored and was not counts as 100 %.",
        "Winkler: the interval's width plus ten times what a run lies outside it, over the measured figure.",
        "scaled: MAPE after one scale per GPU type fitted on the other tables; floor: one constant HFU per GPU type, "
        "likewise.",
        f"in 80 %: share of rows inside the 80 % interval learned from the other tables; over all rows {inside}.",
        "skip: rows without the figure, without a shape, or flagged impossible by their source.",
        *([f"Faster than dense peak allows, so wrong in their source: rows of {', '.join(faster)}."] if faster else []),
    ]


def _percents(x: Line, *names: str) -> tuple[str, ...]:
    return tuple(_percent(getattr(x, name)) for name in names)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _caught(x: Line) -> str:
    return f"{x.oom_caught} of {x.oom_rows}" if x.oom_rows else "–"
