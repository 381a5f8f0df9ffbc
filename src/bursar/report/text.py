"""Pages for the terminal: rich tables that are as wide as the terminal, and uncut where there is none."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bursar.errors import printable

PIPE_COLUMNS = 160  # rich would cut at 80 where it cannot ask a terminal


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """`bursar … | head` is no failure: stop quietly."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)


def console() -> Console:
    """A console on stdout: the terminal's width, COLUMNS if set, else wide enough that nothing is cut."""
    if sys.stdout.isatty():
        return _Console(highlight=False)
    columns = os.environ.get("COLUMNS", "")
    return _Console(highlight=False, width=int(columns) if columns.isdecimal() and int(columns) else PIPE_COLUMNS)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Table:
    """A plain table: the first ``left`` columns to the left, numbers to the right. Cells are text, never markup."""
    made = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False,
                 show_header=any(columns))  # fmt: skip
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*(escape(printable(cell, keep="")) for cell in row))
    return made


def line(text: str, style: str = "") -> Text:
    """One line of plain text."""
    return Text(printable(text), style=style)


def note(text: str) -> Padding:
    """A remark under a heading or a table: indented, also where it wraps."""
    return Padding(line(text), (0, 0, 0, 2))


BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], low: float, high: float, *, width: int = 40, log: bool = False) -> str:
    """``values`` as a row of bars of eight heights, thinned to ``width``, from ``low`` to ``high``.

    >>> sparkline([0, 1, 2, 7], 0, 7)
    '▁▂▃█'
    """
    if len(values) > width:
        values = [values[i * (len(values) - 1) // (width - 1)] for i in range(width)]
    if log:
        values, low, high = [math.log(max(v, low)) for v in values], math.log(low), math.log(high)
    span = (high - low) or 1.0
    return "".join(BARS[round(min(1.0, max(0.0, (v - low) / span)) * (len(BARS) - 1))] for v in values)
