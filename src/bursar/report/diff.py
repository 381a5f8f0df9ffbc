"""The page, the Markdown and the JSON of ``bursar diff``: no times, no paths of this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from bursar.diff import ALWAYS, FIGURES, OF_A_MODULE, Change, Diff, ModuleChange, Side, span
from bursar.modules import label
from bursar.report.markdown import escaped, markdown_table
from bursar.report.record import SCHEMA_VERSION
from bursar.report.text import line, note, table
from bursar.units import format_bytes, format_count, format_flops, format_seconds

_SMALL = 10**5  # below this a count is written whole, as on the page of a step
_WRITE: Mapping[str, Any] = {"": format_count, "FLOP": format_flops, "B": format_bytes, "s": format_seconds}
_COLUMNS = ("", "before", "after", "change", "")
NOTHING = "no difference"


def diff_record(diff: Diff, allowed: Mapping[str, Fraction], over: Sequence[str]) -> dict[str, Any]:
    """The JSON: every figure and every module that changed, unrounded."""
    return {
        "schema_version": SCHEMA_VERSION,
        "a": _side(diff.a),
        "b": _side(diff.b),
        "same": diff.same,
        "figures": {c.figure: _change(c) for c in diff.figures},
        "modules": [
            {
                "module": m.module,
                "copies": m.copies,
                "status": m.status,
                "was": m.was,
                "figures": {c.figure: _change(c) for c in m.changes},
                "lines": list(m.lines),
            }
            for m in diff.modules
        ],
        "files": [
            {"file": f.path, "added": f.added, "removed": f.removed, "lines": [span(f.path, x) for x in f.lines]}
            for f in diff.files
        ],
        "uncounted": list(diff.uncounted),
        "notes": list(diff.notes),
        "assumptions": {"a": list(_assumptions(diff.a)), "b": list(_assumptions(diff.b))},
        "max_increase": {name: float(share) for name, share in allowed.items()},
        "over": list(over),
    }


def _side(side: Side) -> dict[str, Any]:
    return {
        "model": side.name,
        "revision": side.revision or None,
        "hardware": side.record.get("hardware"),
        "versions": side.record.get("versions"),
    }


def _change(change: Change) -> dict[str, Any]:
    return {
        "before": change.before,
        "after": change.after,
        "change": change.change,
        "relative": change.relative,
    }


def render(diff: Diff) -> Iterator[Any]:
    """Sides, figures, modules, lines, notes; each part a renderable."""
    for letter, side in (("A", diff.a), ("B", diff.b)):
        yield line(f"{letter}  {_title(side)}", style="bold")
    if diff.same:
        yield line(_verdict(diff))
    else:
        yield table("What one step costs", _COLUMNS, [_cells(FIGURES[c.figure], c) for c in _shown(diff)])
        yield from _modules(diff)
    if diff.files:
        yield table(
            "Lines of the model's code",
            ("file", "", "", "where"),
            [(f.path, f"+{f.added}", f"−{f.removed}", ", ".join(span("", x)[1:] for x in f.lines)) for f in diff.files],
        )
    for text in _remarks(diff):
        yield note(text)


def _modules(diff: Diff) -> Iterator[Any]:
    rows: list[tuple[str, ...]] = []
    for m in diff.modules:
        words = iter(_named(m))
        for change in m.changes:
            rows.append((next(words, ""), *_cells(OF_A_MODULE[change.figure], change)))
        rows += [(word, "", "", "", "", "") for word in words]
    if rows:
        yield table("By module, the largest change first", ("module", *_COLUMNS), rows, left=2)


def _named(m: ModuleChange) -> Iterator[str]:
    """What stands in a module's first column, line by line."""
    yield label(m.module, m.copies)
    if m.status == "renamed":
        yield f"  was {label(m.was, m.copies)}"
    elif m.status != "changed":
        yield f"  {m.status}"
    if m.copies > 1:
        yield f"  {m.copies} alike, each"
    yield from (f"  {lines}" for lines in m.lines)


def markdown(diff: Diff, over: Sequence[str]) -> str:
    """The same as a Markdown page, for a job's summary or a comment."""
    out = [f"**A** {escaped(_title(diff.a))}  ", f"**B** {escaped(_title(diff.b))}", ""]
    out += [*(f"**Over the limit:** {escaped(text)}" for text in over), *([""] if over else [])]
    if diff.same:
        out += [_verdict(diff), ""]
    else:
        out += markdown_table(_COLUMNS, [_cells(FIGURES[c.figure], c) for c in _shown(diff)])
    if diff.modules:
        rows = [
            (", ".join(word.strip() for word in _named(m)), *(_cells(OF_A_MODULE[c.figure], c) if c else ("",) * 5))
            for m in diff.modules
            for c in m.changes or (None,)
        ]
        out += ["By module, the largest change first:", "", *markdown_table(("module", *_COLUMNS), rows)]
    if diff.files:
        rows = [
            (f.path, f"+{f.added}", f"−{f.removed}", ", ".join(span("", x)[1:] for x in f.lines)) for f in diff.files
        ]
        out += ["Lines of the model's code:", "", *markdown_table(("file", "", "", "where"), rows)]
    out += [f"- {escaped(text)}" for text in _remarks(diff)]
    return "\n".join(out).rstrip() + "\n"


def _title(side: Side) -> str:
    step = side.record["step"]
    at = f" at {side.revision}" if side.revision and "(" in side.revision else ""
    at = at or (f" in the {side.revision}" if side.revision else "")
    parameters = format_count(side.record["model"]["parameters"])
    samples, tokens = (f"{step[what]} {what[:-1] if step[what] == 1 else what}" for what in ("samples", "tokens"))
    return f"{side.name}{at}: {parameters} parameters, {samples} = {tokens}"


def _verdict(diff: Diff) -> str:
    if diff.files:
        return f"{NOTHING}: the code changed, and no figure of the step did"
    return f"{NOTHING} in any figure of the step"


def _shown(diff: Diff) -> list[Change]:
    return [c for c in diff.figures if c.before != c.after or (c.figure in ALWAYS and c.before is not None)]


def _remarks(diff: Diff) -> Iterator[str]:
    if diff.uncounted:
        yield f"B leaves {', '.join(diff.uncounted)} uncounted where A does not: its FLOPs are at least these"
    hardware = diff.a.record.get("hardware")
    if hardware and hardware == diff.b.record.get("hardware"):
        yield (
            f"time bound: the roofline of {hardware['count']} × {hardware['name']}, that no run beats "
            "(--on takes another device)"
        )
    yield from diff.notes
    common = set(_assumptions(diff.a)) & set(_assumptions(diff.b))
    for letter, side in (("A", diff.a), ("B", diff.b)):
        yield from (f"{letter} alone: {text}" for text in _assumptions(side) if text not in common)


def _assumptions(side: Side) -> tuple[str, ...]:
    return tuple(str(text) for text in side.record.get("assumptions") or ())


def _cells(what: tuple[str, str], change: Change) -> tuple[str, ...]:
    """Name, before, after, change, share of what was before."""
    name, unit = what
    before, after, by = change.before, change.after, change.change
    if not by:
        return name, _written(before, unit), _written(after, unit), "", ""
    sign = "+" if by > 0 else "−"
    return name, _written(before, unit), _written(after, unit), f"{sign}{_written(abs(by), unit)}", _share(change, sign)


def _share(change: Change, sign: str) -> str:
    if change.relative is None:
        return "new"
    percent = abs(change.relative) * 100
    return f"{sign}{percent:.1f} %" if percent >= 0.05 else f"{sign}<0.1 %"


def _written(n: int | float | None, unit: str) -> str:
    if n is None:
        return "n/a"
    if isinstance(n, int) and unit != "s" and abs(n) < _SMALL:
        return f"{n} {unit}".rstrip()
    return str(_WRITE[unit](n))
