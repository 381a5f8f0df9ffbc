"""What pages are put together from: headline figures, tables that sort and search, pictures to walk through."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bursar.report.html.markup import Markup, data, join, tag
from bursar.report.html.plots import share_bar
from bursar.roofline import Forecast
from bursar.units import format_bytes, format_seconds, format_share

WIDE, NARROW = 952, 358  # a desktop's column; a phone of 390 less its margins
CELLS = 400  # rows of one table; what is beyond stands in one more, so that a page keeps its size


@dataclass(frozen=True, slots=True)
class Column:
    """A table's column: numbers stand to the right, and a minor one is left out where there is no room."""

    title: str
    number: bool = True
    minor: bool = False
    name: bool = False  # may be as long as a model's author likes, and breaks anywhere


@dataclass(frozen=True, slots=True)
class Cell:
    """What a cell shows and what it is sorted by."""

    shown: object
    value: float | int | str | None = None


Row = Sequence[Cell | str]


def headline(figures: Iterable[tuple[str, object, object, dict[str, object]]]) -> Markup:
    """(name, value, remark, attributes of the value): the figures that a page begins with."""
    return tag(
        "dl",
        *(
            tag("div", tag("dt", name), tag("dd", tag("span", value, class_="figure"), tag("small", remark), **more))
            for name, value, remark, more in figures
        ),
        class_="headline",
    )


def table(
    id_: str,
    caption: str,
    columns: Sequence[Column],
    rows: Sequence[Row],
    *,
    foot: Row | None = None,
    sort: bool = True,
    search: str = "",
    snug: bool = False,
) -> Markup:
    """A table that ``report.js`` sorts by its columns and searches; ``search`` is the label of the field for that.

    A ``snug`` one is as wide as what it holds.
    """
    head = tag("tr", *(tag("th", c.title, scope="col", class_=_class(c)) for c in columns))
    body = [tag("tr", *_cells(columns, row)) for row in rows]
    made = tag(
        "table",
        tag("caption", tag("span", caption)),
        tag("thead", head) if any(c.title for c in columns) else None,
        tag("tbody", *body),
        tag("tfoot", tag("tr", *_cells(columns, foot))) if foot is not None else None,
        id=id_,
        class_="snug" if snug else None,
        data_sort="" if sort and len(rows) > 1 else None,
    )
    field = (
        tag(
            "p",
            tag("label", search, for_=f"{id_}-search"),
            tag("input", type="search", id=f"{id_}-search", data_search=id_, autocomplete="off", spellcheck="false"),
            tag("output", for_=f"{id_}-search"),
            class_="search",
            hidden=True,
        )
        if search and len(rows) > 8
        else None
    )
    # it scrolls sideways on a phone: who has no pointer must reach it
    tall = "scroll tall" if len(rows) > 16 else "scroll"
    return join((field, tag("div", made, class_=tall, role="region", aria_label=caption, tabindex="0")))


def _class(column: Column) -> str | None:
    return " ".join(n for n, on in (("n", column.number), ("minor", column.minor), ("name", column.name)) if on) or None


def _cells(columns: Sequence[Column], row: Row) -> Iterable[Markup]:
    for i, (column, given) in enumerate(zip(columns, row, strict=True)):
        cell = given if isinstance(given, Cell) else Cell(given)
        name = {"scope": "row"} if not i else {}
        yield tag("th" if not i else "td", cell.shown, class_=_class(column), data_v=cell.value, **name)


def figure(
    id_: str,
    pictures: Sequence[tuple[str, Markup, Markup]],
    caption: object,
    *,
    walk: str,
    switch: str = "",
    said: Any = None,
    start: int = 0,
) -> Markup:
    """Pictures as (name, for a wide page, for a narrow one), one shown at a time; keys walk through their marks.

    ``walk`` labels the control for that, ``switch`` the choice of one of several pictures. ``said`` is what is told of
    each mark, where the marks do not carry it themselves; ``start`` is the first one told of.
    """
    choice = None
    if len(pictures) > 1:
        choice = tag(
            "fieldset",
            tag("legend", switch),
            *(
                tag(
                    "label",
                    tag("input", type="radio", name=f"{id_}-shows", class_=f"sw-{i}", checked=not i),
                    tag("span", name),
                )
                for i, (name, _, _) in enumerate(pictures)
            ),
            class_="switch",
        )
    panels = (
        tag("div", tag("div", wide, class_="wide"), tag("div", narrow, class_="narrow"), class_=f"panel panel-{i}")
        for i, (_, wide, narrow) in enumerate(pictures)
    )
    control = tag(
        "div",
        tag("label", walk, for_=f"{id_}-walk"),
        tag("input", type="range", id=f"{id_}-walk", min="0", max="0", value=str(start), data_walk=id_),
        tag("output", for_=f"{id_}-walk", class_="said"),
        class_="walk",
        hidden=True,
    )
    return tag(
        "figure",
        choice,
        *panels,
        control,
        tag("figcaption", caption) if caption else None,
        data(said, f"{id_}-said") if said is not None else None,
        id=id_,
        class_="switched" if choice is not None else None,
    )


def legend(entries: Iterable[tuple[str, object]]) -> Markup:
    """(class, words): which colour is what."""
    return tag("ul", *(tag("li", swatch(class_), words) for class_, words in entries), class_="legend")


def swatch(class_: str) -> Markup:
    """A square of a class's colour; the words beside it say the same."""
    return tag(
        "svg",
        tag("rect", width=10, height=10, rx=2, class_=class_),
        viewBox="0 0 10 10",
        width=10,
        height=10,
        class_="swatch",
        aria_hidden="true",
    )


class Section(NamedTuple):
    """A part of the page under a heading of its own."""

    id: str
    title: str
    markup: Markup


def section(id_: str, title: str, *children: object) -> Section:
    """A part of the page: ``children`` under the heading ``title``."""
    return Section(
        id_, title, tag("section", tag("h2", title, id=f"{id_}-h"), *children, id=id_, aria_labelledby=f"{id_}-h")
    )


def contents(sections: Iterable[Section]) -> Markup:
    """Links to the sections."""
    links = (tag("li", tag("a", s.title, href=f"#{s.id}")) for s in sections)
    return tag("nav", tag("ul", *links), aria_label="Sections")


def device_of(forecast: Forecast) -> str:
    """What a forecast is for, as a page says it."""
    cluster = forecast.cluster
    return f"{cluster.count} × {cluster.accelerator.title}" if cluster.count > 1 else cluster.accelerator.title


def bullets(lines: Iterable[str]) -> Markup:
    """A list."""
    return tag("ul", *(tag("li", words) for words in lines), class_="plain")


def amount(n_bytes: int) -> Cell:
    """Bytes, sorted by their number."""
    return Cell(format_bytes(n_bytes), n_bytes)


def duration(seconds: float) -> Cell:
    """Seconds, sorted by their number."""
    return Cell(format_seconds(seconds) if seconds else "0 s", seconds)


def share(share: float, bar: bool = True) -> Cell:
    """A share of 1 with a short bar beside it."""
    return Cell(join((format_share(share), share_bar(share) if bar else None)), share)


def times(n: int, what: str) -> str:
    """``n`` of ``what``, one or many.

    >>> times(1, "call"), times(2048, "micro-batch")
    ('1 call', '2,048 micro-batches')
    """
    return f"{n:,} {what}" + ("" if n == 1 else "es" if what.endswith("ch") else "s")
