"""What a notebook shows of a record: a small table or two and a picture, in the notebook's own light or dark.

Styles are scoped to the class ``bursar``, for a notebook is one page, and where they are stripped (as on a code host's
preview) the tables stay tables. Nothing here loads or runs anything.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

from bursar.ledger import Ledger
from bursar.memory import CLASSES
from bursar.modules import label, shares
from bursar.report import figures
from bursar.report.html import plots
from bursar.report.html.markup import Markup, asset, clipped, join, tag
from bursar.report.html.parts import swatch
from bursar.roofline import Forecast
from bursar.units import format_bytes, format_count, format_flops, format_seconds, format_share

_COLUMNS = 180
_MODULES = 8
_LOOKS = """
.bursar { color: inherit; font-size: 13px; line-height: 1.5; max-width: 720px; --ink: currentColor;
  --page: transparent; }
.bursar table.bursar-table { border-collapse: collapse; margin: 6px 0 10px; font-variant-numeric: tabular-nums; }
.bursar caption { text-align: left; white-space: nowrap; font-weight: 600; padding: 0 0 2px; color: inherit; }
.bursar .bursar-table th, .bursar .bursar-table td { text-align: right; padding: 2px 14px 2px 0; background: none;
  border: 0; border-bottom: 1px solid var(--rule); font-weight: 400; }
.bursar .bursar-table :is(th, td):first-child { text-align: left; }
.bursar .bursar-table thead th { color: var(--soft); }
.bursar .bursar-swatches span { margin-right: 14px; white-space: nowrap; }
"""


def _rules(css: str) -> str:
    """The colours and the rules of SVG in ``style.css``, for what stands inside ``.bursar`` alone."""
    css = re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL)
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    drawing = css[css.index("svg text {") : css.index("@media (max-width")]
    scoped = re.sub(r"(?m)(^|(?<=\} )|(?<=, ))(?=[.\w\[])(?=[^{}]*\{)", ".bursar ", drawing.strip())
    themes = "body[data-jp-theme-light=false] .bursar, .vscode-dark .bursar"
    night = f"@media (prefers-color-scheme: dark) {{ .bursar {{{dark}}} }} {themes} {{{dark}}}"
    whole = f".bursar {{{light}}} {night} {scoped} {_LOOKS}"
    return re.sub(r"\s+", " ", whole.replace("color-scheme: light dark;", ""))


def _framed(*children: object) -> str:
    css = asset("style.css")
    light = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", css.partition("@media")[0]))
    body = join(children)
    # a class's colour as an attribute too: it holds where the style is stripped, and any style overrides it
    body = Markup(re.sub(r'class="c-(\w+)"', lambda m: f'{m[0]} fill="{light[m[1]]}"', body))
    return tag("div", tag("style", Markup(_rules(css))), body, class_="bursar")


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Markup:
    """A table of text; cells that are markup stay so."""
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *(tag("th", c, scope="col") for c in columns))) if any(columns) else None,
        tag("tbody", *(tag("tr", *(tag("td", cell) for cell in row)) for row in rows)),
        class_="bursar-table",
    )


def show(caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table by itself, as ``_repr_html_`` returns it: for records that are a list of lines."""
    return _framed(table(caption, columns, rows))


def ledger(step: Ledger) -> str:
    """A step's headline, its memory over time and what its largest modules cost."""
    flops, memory, model = step.flops, step.memory, step.model
    least = "at least " if flops.uncounted else ""
    size = f"{format_count(model.parameters)} parameters, {step.step.tokens:,} tokens a step"
    title = f"{model.name or 'A training step'}: {size}"
    head = table(
        title,
        (),
        [
            ("peak memory", tag("span", format_bytes(memory.peak_bytes), data_peak_bytes=memory.peak_bytes)),
            ("model FLOPs", least + format_flops(flops.model)),
            ("hardware FLOPs", least + format_flops(flops.hardware)),
        ],
    )
    if not step.recorded:
        return _framed(head)
    course = figures.course(step, None, _COLUMNS)
    id_ = f"bursar-{zlib.crc32(f'{title} {memory.peak_bytes} {len(step)}'.encode(errors='replace')):08x}"
    drawn = plots.timeline(course, id_, width=680, height=220)
    there = [c for c in plots.STACK if any(m.live[CLASSES.index(c)] for m in course.moments)]
    legend = tag(
        "p", *(tag("span", swatch(f"c-{c}"), f" {c.replace('_', ' ')}") for c in there), class_="bursar-swatches"
    )
    found = sorted(shares(step), key=lambda m: (-m.copies * m.flops, -m.copies * m.bytes_moved))
    modules = table(
        "By module, those alike together: the largest",
        ("module", "FLOPs", "bytes moved", "at the peak"),
        [
            (
                clipped(label(m.module, m.copies)),
                format_flops(m.copies * m.flops),
                format_bytes(m.copies * m.bytes_moved),
                format_bytes(m.copies * m.bytes_at_peak),
            )
            for m in found[:_MODULES]
        ],
    )
    return _framed(head, drawn, legend, modules)


def forecast(priced: Forecast) -> str:
    """Time, MFU, what binds it and whether it fits."""
    cluster = priced.cluster
    interval = f"{format_seconds(priced.lower_seconds)} … {format_seconds(priced.upper_seconds)}"
    rows = [
        ("expected", format_seconds(priced.seconds), f"{interval}, {priced.basis}"),
        ("roofline bound", format_seconds(priced.roofline_seconds), ""),
        ("MFU", format_share(priced.mfu), f"HFU {format_share(priced.hfu)}"),
        *(
            (f"bound by {k}", format_seconds(v), format_share(v / priced.seconds))
            for k, v in priced.bound_by.items()
            if v
        ),
        (
            "memory",
            "fits" if priced.fits else "does not fit",
            f"{format_bytes(priced.peak_bytes)} of {format_bytes(priced.usable_bytes)} usable",
        ),
    ]
    return show(f"One step on {cluster.count} × {cluster.accelerator.title}", (), rows)
