"""Bars as SVG: a whole by its parts, against a capacity and with an interval. Widths are per cent, colours by class."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape


def bar(
    parts: Iterable[tuple[str, float, str]],
    title: str,
    *,
    capacity: float | None = None,
    interval: tuple[float, float] | None = None,
    height: int = 34,
) -> str:
    """(class, value, words) side by side; a line at ``capacity`` and a whisker over ``interval`` where they are given.

    Everything is drawn to one scale, from 0 to the largest of the three. The words are each part's title, and with
    ``title`` they are what a screen reader reads.
    """
    found = [p for p in parts if p[1] > 0 and math.isfinite(p[1])]
    whole = math.fsum(value for _, value, _ in found)
    most = max(whole, capacity or 0.0, interval[1] if interval else 0.0) or 1.0

    def at(value: float) -> str:
        return f"{100 * value / most:.2f}%"

    drawn = [f'<rect class="track" x="0" y="0" width="{at(capacity or most)}" height="{height}"/>']
    start = 0.0
    for name, value, words in found:
        drawn.append(
            f'<rect class="{escape(name)}" x="{at(start)}" y="0" width="{at(value)}" height="{height}">'
            f"<title>{escape(words)}</title></rect>"
        )
        start += value
    if capacity is not None:
        drawn.append(f'<line class="capacity" x1="{at(capacity)}" x2="{at(capacity)}" y1="-6" y2="{height + 6}"/>')
    if interval is not None:
        middle = height / 2
        low, high = at(interval[0]), at(interval[1])
        drawn.append(f'<line class="whisker under" x1="{low}" x2="{high}" y1="{middle:g}" y2="{middle:g}"/>')
        for x in (low, high):
            drawn.append(f'<line class="whisker under" x1="{x}" x2="{x}" y1="{middle - 7:g}" y2="{middle + 7:g}"/>')
        drawn.append(f'<line class="whisker" x1="{low}" x2="{high}" y1="{middle:g}" y2="{middle:g}"/>')
        for x in (low, high):
            drawn.append(f'<line class="whisker" x1="{x}" x2="{x}" y1="{middle - 7:g}" y2="{middle + 7:g}"/>')
    about = "; ".join([title, *(words for _, _, words in found)])
    opened = f'<svg class="bar" width="100%" height="{height}" role="img" aria-label="{escape(about)}">'
    return opened + "".join(drawn) + "</svg>"
