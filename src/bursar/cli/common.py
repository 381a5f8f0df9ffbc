"""What every command shares: one object on stdout with ``--json``, else the page; progress and warnings on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter

from bursar.errors import printable

Json = Annotated[bool, Parameter(negative=(), help="print one JSON object and nothing else")]
Explain = Annotated[bool, Parameter(negative=(), help="give formula, inputs and source of each headline figure")]


def print_json(record: Any) -> None:
    """``record`` as one line of strict JSON."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(record), indent=2).decode() + "\n")


def print_page(*parts: Any) -> None:
    """Print renderables and text: as wide as the terminal, and never cut when it is a pipe."""
    from bursar.report.text import console

    out = console()
    if out.is_terminal:
        for part in parts:
            out.print(part)
        return
    with out.capture() as page:  # rich pads every line to the table's width; a file wants none of it
        for part in parts:
            out.print(part)
    sys.stdout.write("".join(line.rstrip() + "\n" for line in page.get().splitlines()))


def warn(messages: Iterable[str]) -> None:
    """Each message on a line of stderr."""
    for message in messages:
        print(f"warning: {printable(message)}", file=sys.stderr)


def say(text: str) -> None:
    """A line of progress on a terminal's stderr."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        print(f"  {printable(text)}", file=sys.stderr)


@contextlib.contextmanager
def progress(text: str) -> Iterator[None]:
    """Say what takes long, on a terminal's stderr only, and take it back when it is done."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def need_torch(why: str) -> None:
    """Raise MissingExtra where torch is not installed."""
    import importlib.util

    from bursar.errors import MissingExtra

    if importlib.util.find_spec("torch") is None:
        raise MissingExtra("torch", why)
