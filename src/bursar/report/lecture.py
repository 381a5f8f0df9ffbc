"""The page and the JSON of ``bursar lecture``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from rich.table import Table

from bursar.report.record import SCHEMA_VERSION
from bursar.report.text import line

TITLES = {
    "7": "what operations cost",
    "8": "what gradients cost",
    "9": "parameters and their initialisation",
    "10": "optimizers and memory",
}
VERDICTS = ("right", "depends", "misleading", "wrong", "not checkable")


@dataclass(frozen=True, slots=True)
class Line:
    """One claim of the notes with what bursar makes of it. ``verdict`` is None where an extra it needs is missing."""

    id: str
    claim: str
    notes: str
    correct: str
    computed: str | None = None
    verdict: str | None = None
    holds: tuple[tuple[str, bool], ...] = ()  # under which conditions the statement was found true
    follows: tuple[tuple[str, bool], ...] = ()  # whether what the notes draw from it is
    reason: str = ""  # why there is no computed value: no code settles it, or an extra is missing


class ClaimRecord(msgspec.Struct):
    """One claim in JSON; ``computed`` and ``verdict`` are null where it could not be executed."""

    id: str
    claim: str
    notes: str
    computed: str | None
    verdict: str | None
    correct: str


class LectureRecord(msgspec.Struct, kw_only=True):
    """What ``bursar lecture --json`` prints."""

    schema_version: int = SCHEMA_VERSION
    claims: list[ClaimRecord]


def lecture_record(lines: Sequence[Line]) -> LectureRecord:
    """The record of ``lines``."""
    return LectureRecord(claims=[ClaimRecord(x.id, x.claim, x.notes, x.computed, x.verdict, x.correct) for x in lines])


def render(lines: Sequence[Line], *, explain: bool = False) -> Iterator[Any]:
    """Claim by claim, then what could not be executed here, then the count by verdict.

    ``explain`` adds the conditions tested.
    """
    yield line("The claims of the lecture notes: what they say, what bursar computes, the verdict", style="bold")
    for x in lines:
        if x.verdict is not None:
            yield line("")
            yield line(f"{x.id}  {x.claim}", style="bold")
            yield _block(x, explain)
    missing = [f"{x.id} ({x.reason})" for x in lines if x.verdict is None]
    if missing:
        yield line("")
        yield line(f"Not executed here: {', '.join(missing)}")
    yield line("")
    yield line(_count(lines), style="bold")


def markdown(lines: Sequence[Line]) -> str:
    """The claims as the body of a Markdown page: a heading, the count and a list for each chapter."""
    found = []
    for chapter in dict.fromkeys(x.id.split(".")[0] for x in lines):
        of_chapter = [x for x in lines if x.id.split(".")[0] == chapter]
        found.append(f"## Chapter {chapter}: {TITLES[chapter]}\n\n`bursar lecture {chapter}`. {_count(of_chapter)}.\n")
        for x in of_chapter:
            found.append(
                f"**{x.id}** {_plain(x.claim)}\n\n- notes: {_plain(x.notes)}\n"
                f"- bursar: {_plain(x.computed or x.reason)}\n- **{x.verdict}**: {_plain(x.correct)}\n"
            )
    return "\n".join(found)


def _plain(text: str) -> str:
    """``text`` with what Markdown would read as markup escaped."""
    return re.sub(r"([*_<>\[\]`|])", r"\\\1", text)


def _block(x: Line, explain: bool) -> Table:
    """Label and text, wrapped beside the label."""
    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(min_width=9)
    made.add_column(overflow="fold")
    made.add_row("  notes", line(x.notes))
    made.add_row("  bursar", line(x.computed or x.reason))
    if explain:
        for label, conditions in (("tested", x.holds), ("drawn", x.follows)):
            for condition, holds in conditions:
                made.add_row(f"  {label}", line(f"{condition}: {'yes' if holds else 'no'}"))
    made.add_row("  verdict", line(x.verdict or "", style=_STYLES.get(x.verdict or "", "")))
    made.add_row("  correct", line(x.correct))
    return made


_STYLES = {
    "right": "green",
    "depends": "yellow",
    "misleading": "yellow",
    "wrong": "red",
}  # beside the word, never for it


def _count(lines: Sequence[Line]) -> str:
    by_verdict = [(v, sum(x.verdict == v for x in lines)) for v in VERDICTS]
    missing = sum(x.verdict is None for x in lines)
    parts = [f"{n} {v}" for v, n in by_verdict if n] + ([f"{missing} not executed"] if missing else [])
    return f"{len(lines)} claims: {', '.join(parts)}"
