"""Pictures as files of their own: the memory timeline as SVG, drawn here, or as PNG, which takes matplotlib."""

from __future__ import annotations

import re
from pathlib import Path

from bursar.errors import MissingExtra, printable
from bursar.ledger import Ledger
from bursar.memory import CLASSES
from bursar.report import figures
from bursar.report.html import plots
from bursar.report.html.markup import Markup, asset, clipped, tag
from bursar.roofline import Forecast
from bursar.units import format_bytes

COLUMNS = 720


def _course(ledger: Ledger, forecast: Forecast | None) -> figures.Course:
    return figures.course(ledger, figures.row_seconds(ledger, forecast) if forecast is not None else None, COLUMNS)


def svg(ledger: Ledger, forecast: Forecast | None = None) -> str:
    """The memory timeline with its legend, as a file: light or dark as the viewer is."""
    course = _course(ledger, forecast)
    wide, high = 952.0, 330.0
    drawn = plots.timeline(
        course, "timeline", width=wide, height=high, capacity=forecast.usable_bytes if forecast is not None else None
    )
    there = [c for c in plots.STACK if any(m.live[CLASSES.index(c)] for m in course.moments)]
    legend = [
        tag(
            "g",
            tag("rect", x=58 + 125 * i, y=high + 8, width=10, height=10, class_=f"c-{c}"),
            tag("text", c.replace("_", " "), x=74 + 125 * i, y=high + 17),
        )
        for i, c in enumerate(there)
    ]
    page = tag("rect", width=wide, height=high + 28, class_="page")
    body = drawn.removesuffix("</svg>").replace(
        f'viewBox="0 0 {wide:g} {high:g}"', f'viewBox="0 0 {wide:g} {high + 28:g}"'
    )
    head, _, rest = body.partition(">")
    style = tag("style", Markup(colours() + ".page{fill:var(--page)} svg{font-family:system-ui,sans-serif}"))
    return f"{head}>{style}{page}{rest}{Markup('').join(legend)}</svg>\n"


def colours() -> str:
    """The part of ``style.css`` that pictures need: its colours and the rules of SVG."""
    style = re.sub(r"/\*.*?\*/", "", asset("style.css"), flags=re.DOTALL)
    start, end = style.index("svg text"), style.index("@media (max-width")
    return re.sub(r"\s+", " ", style[: style.index("* { box-sizing")] + style[start:end])


def png(ledger: Ledger, forecast: Forecast | None, path: Path) -> None:
    """The same as a PNG at ``path``. Raises MissingExtra without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("plot", "drawing a PNG takes matplotlib (an .svg takes nothing)") from error
    course = _course(ledger, forecast)
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    axes = figure.subplots()
    scale, unit = (1.0, "ops") if course.seconds is None else (course.seconds, "seconds")
    x = [m.at * (course.ops if course.seconds is None else scale) for m in course.moments]
    there = [c for c in plots.STACK if any(m.live[CLASSES.index(c)] for m in course.moments)]
    palette = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", asset("style.css").partition("@media")[0]))
    axes.stackplot(
        x,
        [[m.live[CLASSES.index(c)] / 1e9 for m in course.moments] for c in there],
        step="post",
        labels=[c.replace("_", " ") for c in there],
        colors=[palette[c] for c in there],
    )
    peak = course.moments[course.peak]
    axes.annotate(
        f"peak {format_bytes(peak.total)}",
        (x[course.peak], peak.total / 1e9),
        (0, 6),
        textcoords="offset points",
        ha="center",
        weight="bold",
    )
    axes.plot([x[course.peak]], [peak.total / 1e9], "o", color="black", markersize=4)
    axes.set(xlabel=unit, ylabel="live GB", xlim=(0, max(x) or 1), ylim=(0, peak.total / 1e9 * 1.15))
    axes.set_title(clipped(printable(ledger.model.name, keep=""), 80), loc="left", parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small", ncols=len(there), frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    figure.savefig(path, dpi=100)
