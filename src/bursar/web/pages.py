"""Records to HTML: templates, and how each kind of number is written. Every string is escaped by the templates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bursar import __version__
from bursar.errors import printable
from bursar.report.bars import bar
from bursar.report.outlook import LABELS, Change, Figure, Part, named, ratio
from bursar.units import format_bytes, format_count, format_seconds, format_share, format_usd
from bursar.web.answers import Answered
from bursar.web.state import EVERY, SECOND, Setup, State, form, query, shown, written

FILES = ("style.css", "page.js", "htmx.min.js", "icon.svg")
GROUPS = {  # of the form: its heading, the fields' groups, and whether it can be folded away
    "What, where, how long": (("model", "cluster", "run"), False),
    "Levers": (("levers",), True),
    "Layout": (("layout",), True),
}
WRITE: dict[str, Callable[[Any], str]] = {
    "seconds": format_seconds,
    "bytes": format_bytes,
    "usd": format_usd,
    "share": format_share,
    "count": format_count,
    "rate": format_count,
    "hours": lambda x: f"{format_count(x)} h",
    "kwh": lambda x: f"{format_count(x)} kWh",
}


def _figure(f: Figure) -> str:
    return "n/a" if f.value is None else WRITE[f.kind](f.value)


def _bound(f: Figure, value: float | None) -> str:
    return "" if value is None else WRITE[f.kind](value)


def _memory_bar(answered: Answered) -> Markup:
    f = answered.figures["memory"]
    interval = None if f.low is None or f.high is None else (f.low, f.high)
    title = f"{_figure(f)} of {format_bytes(answered.usable_bytes)} usable"
    return Markup(bar(_parts(answered.memory, "m", format_bytes), title, capacity=answered.usable_bytes,
                      interval=interval))  # fmt: skip


def _time_bar(answered: Answered) -> Markup:
    title = f"a step of {_figure(answered.figures['step'])}"
    return Markup(bar(_parts(answered.time, "t", format_seconds), title))


def _parts(parts: Sequence[Part], prefix: str, write: Any) -> list[tuple[str, float, str]]:
    return [(f"{prefix}-{p.name}", p.value, f"{named(p.name)} {write(p.value)}") for p in parts]


def _more(n_bytes: float) -> str:
    return "0" if not n_bytes else f"{'-' if n_bytes < 0 else '+'}{format_bytes(abs(n_bytes))}"


def _slower(share: float) -> str:
    text = f"{share:+.1%}".replace("%", " %")
    return text[1:] if text[1:] == "0.0 %" else text


@cache
def _templates() -> Environment:
    made = Environment(
        loader=PackageLoader("bursar.web"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value), keep=""),
    )  # fmt: skip
    made.filters |= {
        "shown": _figure, "low": lambda f: _bound(f, f.low), "high": lambda f: _bound(f, f.high),
        "words": named, "bytes": format_bytes, "seconds": format_seconds, "share": format_share,
        "times": lambda x: "n/a" if x is None else f"{format_count(x)} ×",
        "link": _link,
        "every": lambda setup, side, other: _link(replace(setup, search=EVERY), side, other),
        "more": _more, "slower": _slower, "memory_bar": _memory_bar, "time_bar": _time_bar,
    }  # fmt: skip
    return made


def _address(state: State, path: str = "/") -> str:
    asked = query(state)
    return f"{path}?{asked}" if asked else path


def _link(setup: Setup, side: str, other: Setup | None) -> str:
    """The page with ``setup`` on its side of the comparison, the other side as it is."""
    if other is None:
        return _address(State(setup))
    return _address(State(setup, other) if side == "a-" else State(other, setup))


def levers(state: State, changes: Sequence[Change], part: bool) -> str:
    """What each lever alone would do: the table, or a page around it."""
    template = _templates().get_template("levers.html" if part else "levers_page.html")
    return template.render(changes=changes, back=_address(State(state.first)), title="Levers · bursar")


def changing(state: State, first: Answered, second: Answered | None) -> str:
    """The part of the page that changes as the form does: the answer, and its links."""
    answers = [(first, "a-")] if second is None else [(first, "a-"), (second, "b-")]
    versus = []
    if second is not None:
        for key in LABELS:
            a, b = first.figures.get(key), second.figures.get(key)
            if a is not None and b is not None:
                versus.append((a, b, ratio(a, b)))
    return _templates().get_template("answer.html").render(
        answers=answers, second=second, versus=versus, headline=tuple(LABELS), here=_address(state),
        alone=_address(State(state.first)), both=_address(State(state.first, state.second or state.first)),
        swapped=_address(State(state.second or state.first, state.first)), api=_address(state, "/api"),
        levers=_address(State(state.first), "/levers"),
    )  # fmt: skip


def whole(state: State, first: Answered, second: Answered | None) -> str:
    """The whole page."""
    title = first.title if second is None else f"{first.title} against {second.title}"
    values = {f.name: written(getattr(state.first, f.name)) for f in form()}
    if state.second is not None:
        for f in form():
            mine, its = getattr(state.first, f.name), getattr(state.second, f.name)
            values[SECOND + f.name] = "" if mine == its else written(its)
    return _page(f"{title} · bursar", values, Markup(changing(state, first, second)), state.second is not None)


def whole_refused(pairs: Sequence[tuple[str, str]], message: str, wrong: str, *, waiting: bool = False) -> str:
    """The page with what was given still in its form, and why that cannot be."""
    values = {f.name: written(getattr(Setup(), f.name)) for f in form()}
    values |= {SECOND + f.name: "" for f in form()}
    given = dict(pairs)
    values |= {name: shown(text) for name, text in given.items() if name in values}
    compare = given.get("compare") == "1" or any(name.startswith(SECOND) for name in given)
    part = Markup(part_refused(pairs, message, wrong, waiting=waiting))
    return _page("This cannot be · bursar", values, part, compare, wrong)


def part_refused(_: Sequence[tuple[str, str]], message: str, wrong: str, *, waiting: bool = False) -> str:
    """Why what was given cannot be."""
    return _templates().get_template("refused.html").render(message=message, wrong=wrong, waiting=waiting)


def _page(title: str, values: Mapping[str, str], part: Markup, compare: bool, wrong: str = "") -> str:
    groups = []
    for heading, (kinds, folds) in GROUPS.items():
        names = [f.name for f in form() if f.group in kinds]
        told = any(values[n] != written(getattr(Setup(), n)) or values.get(SECOND + n) for n in names)
        groups.append((heading, names, told if folds else None))
    return _templates().get_template("page.html").render(
        title=title, fields={f.name: f for f in form()}, values=values, part=part, compare=compare, wrong=wrong,
        groups=groups, version=__version__,
    )  # fmt: skip
