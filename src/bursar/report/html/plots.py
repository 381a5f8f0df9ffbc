"""Pictures as SVG: memory over a step, a treemap, ops on the roofline, a bar. No dependency.

Each takes records and a size and gives one element, titled and described for those who do not see it. Colour comes by
class from ``style.css``, so that light, dark and print differ there alone; no mark is told by its colour alone. A mark
carries what a reader may ask of it as its title, which ``report.js`` shows as the pointer or the keys reach it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from bursar.memory import CLASSES
from bursar.report.figures import Cell, Course, Ops
from bursar.report.html.markup import Markup, clipped, join, tag
from bursar.units import format_bytes, format_flops, format_rate, format_seconds, format_share

STACK = ("parameters", "buffers", "optimizer_state", "inputs", "gradients", "activations", "temporary")  # from below
assert sorted(STACK) == sorted(CLASSES)
_LETTER = 0.56  # of the font size: the mean advance of a system font's letters, measured on DejaVu and Roboto
_GROUPS = {
    "matmul": "products",
    "attention": "products",
    "conv": "products",
    "optimizer": "optimizer",
    "collective": "collective",
    "uncounted": "uncounted",
}


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle, from its upper left corner."""

    x: float
    y: float
    width: float
    height: float

    def inset(self, by: float, top: float | None = None) -> Box:
        """Smaller by ``by`` on each side, ``top`` above."""
        above = by if top is None else top
        return Box(self.x + by, self.y + above, max(0.0, self.width - 2 * by), max(0.0, self.height - by - above))


def svg(id_: str, width: float, height: float, title: str, about: str, *children: object, class_: str = "") -> Markup:
    """A picture with a title and a description, which a screen reader reads in its stead."""
    return tag(
        "svg",
        tag("title", title, id=f"{id_}-title"),
        tag("desc", about, id=f"{id_}-desc"),
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        id=id_,
        class_=class_ or None,
        role="img",
        aria_labelledby=f"{id_}-title {id_}-desc",
        xmlns="http://www.w3.org/2000/svg",
    )


def ticks(most: float, about: int = 4) -> list[float]:
    """Round values from 0 up to ``most``, about so many of them.

    >>> ticks(6.7), ticks(0)
    ([0, 2, 4, 6], [0])
    """
    if most <= 0:
        return [0]
    raw = most / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    return [_whole(i * step) for i in range(int(most / step + 1e-9) + 1)]


def _whole(x: float) -> float:
    return int(x) if x == int(x) else x


def _bytes_ticks(most: float) -> list[tuple[float, str]]:
    power = min(6, max(0, int(math.log10(most) // 3))) if most >= 1 else 0
    scale, unit = 1000.0**power, ("B", "kB", "MB", "GB", "TB", "PB", "EB")[power]
    return [(t * scale, f"{t:g} {unit}" if t else "0") for t in ticks(most / scale)]


def _text(x: float, y: float, words: str, class_: str = "", anchor: str = "start", **more: object) -> Markup:
    return tag(
        "text", words, x=x, y=y, class_=class_ or None, text_anchor=None if anchor == "start" else anchor, **more
    )


def _wide(words: str, size: float) -> float:
    return len(words) * size * _LETTER


# -------------------------------------------------------------------------------------------------- memory over a step


def timeline(
    course: Course, id_: str, *, width: float, height: float, capacity: int | None = None, about: str = ""
) -> Markup:
    """Live bytes over the step, the classes one on the other, the peak marked; ``capacity`` where it is near."""
    peak = course.moments[course.peak]
    shown = capacity if capacity and capacity < 1.6 * peak.total else None
    most = max(1, peak.total, shown or 0) * 1.02
    frame = Box(58, 26, width - 58 - 8, height - 26 - 44)
    columns = max(1, len(course.moments) - 1)

    def y(n_bytes: float) -> float:
        return frame.y + frame.height * (1 - n_bytes / most)

    def left(i: int) -> float:  # of a moment's column; the first moment is the step's start and has none
        return frame.x + frame.width * max(0, i - 1) / columns

    grid = [
        join(
            (
                tag("line", x1=frame.x, x2=frame.x + frame.width, y1=y(t), y2=y(t), class_="grid"),
                _text(frame.x - 8, y(t) + 4, words, "tick", "end"),
            )
        )
        for t, words in _bytes_ticks(most)
    ]
    order = [CLASSES.index(c) for c in STACK]
    layers = []
    for depth in range(len(STACK), 0, -1):  # the highest first, each painted over by those below it
        if not any(m.live[order[depth - 1]] for m in course.moments):
            continue
        tops = [sum(m.live[i] for i in order[:depth]) for m in course.moments[1:] or course.moments]
        layers.append(tag("path", d=_steps(frame, tops, y), class_=f"c-{STACK[depth - 1]}"))
    at = left(course.peak) + frame.width / columns / 2
    words = f"peak {format_bytes(peak.total)}"
    half = _wide(words, 13) / 2
    anchor = "start" if at - half < frame.x else "end" if at + half > frame.x + frame.width else "middle"
    marks = [
        tag("line", x1=at, x2=at, y1=frame.y, y2=frame.y + frame.height, class_="peak-line"),
        tag("circle", cx=at, cy=y(peak.total), r=4, class_="peak"),
        _text(at, frame.y - 10, words, "strong", anchor),
    ]
    if shown is not None:
        over = peak.total > shown
        label = f"{format_bytes(shown)} usable"
        # beside the peak's own words there is no room for more
        far = anchor if anchor != "middle" else "end" if at < frame.x + frame.width / 2 else "start"
        x = frame.x + 6 if far in ("end", "middle") else frame.x + frame.width - 6
        marks += [
            tag("line", x1=frame.x, x2=frame.x + frame.width, y1=y(shown), y2=y(shown), class_="capacity"),
            _text(x, y(shown) + (14 if not over else -5), label, "halo", "start" if x < frame.x + 9 else "end"),
        ]
    floor = frame.y + frame.height
    phases = []
    for phase, start, end in course.phases:
        x, w = frame.x + start * frame.width, (end - start) * frame.width
        phases.append(
            tag("rect", tag("title", phase), x=x, y=floor + 5, width=max(1.0, w - 1), height=6, class_=f"p-{phase}")
        )
        if w > _wide(phase, 12) + 8:
            phases.append(_text(x + w / 2, floor + 25, phase, "tick", "middle"))
    length = f"{course.ops} ops" if course.seconds is None else format_seconds(course.seconds)
    ends = [_text(frame.x, floor + 39, "0", "tick"), _text(frame.x + frame.width, floor + 39, length, "tick", "end")]
    cursor = tag("line", x1=0, x2=0, y1=frame.y, y2=floor, class_="cursor")
    columns_data = {"data-x0": frame.x, "data-w": frame.width}
    body = tag(
        "g",
        *grid,
        *layers,
        *phases,
        *ends,
        *marks,
        cursor,
        class_="columns",
        **{k.replace("-", "_"): v for k, v in columns_data.items()},
    )
    title = f"Live bytes over the step: peak {format_bytes(peak.total)}"
    return svg(id_, width, height, title, about or title, body, class_="plot timeline")


def _steps(frame: Box, tops: Sequence[int], y: Callable[[float], float]) -> str:
    """A path along ``tops``, closed below: one point where the height changes."""
    path, last = [f"M{frame.x:g} {frame.y + frame.height:.1f}"], None
    for i, top in enumerate(tops):
        height = f"{y(top):.1f}"
        if height != last:
            path.append(f"H{frame.x + frame.width * i / len(tops):.1f}V{height}")
            last = height
    return "".join([*path, f"H{frame.x + frame.width:.1f}V{frame.y + frame.height:.1f}Z"])


def moments(course: Course, where: Callable[[int], str]) -> list[str]:
    """What is to be said of each moment: when, at what op (``where(row)``), what is live."""
    found = []
    for moment in course.moments:
        if course.seconds is None:
            when = f"op {moment.row + 1} of {course.ops}"
        else:
            when = format_seconds(course.seconds * moment.at) if moment.at else "0 s"
        what = f"{when}, {where(moment.row)}" if 0 <= moment.row < course.ops else "before the step"
        live = sorted(((n, c) for n, c in zip(moment.live, CLASSES, strict=True) if n), reverse=True)
        parts = ", ".join(f"{c.replace('_', ' ')} {format_bytes(n)}" for n, c in live)
        found.append(f"{what}: {format_bytes(moment.total)} live ({parts})")
    return found


# ------------------------------------------------------------------------------------------------------------- treemap


def squarify(values: Sequence[float], box: Box) -> list[Box]:
    """A rectangle for each value, its area in proportion, as near a square as may be (Bruls, Huizing, van Wijk 2000).

    Values are positive, the largest first.

    >>> [round(b.width * b.height) for b in squarify([6, 3, 1], Box(0, 0, 10, 1))]
    [6, 3, 1]
    """
    whole = math.fsum(values)
    if not whole or box.width <= 0 or box.height <= 0:
        return [Box(box.x, box.y, 0.0, 0.0) for _ in values]
    scale = box.width * box.height / whole
    found: list[Box] = []
    rest, row = [v * scale for v in values], list[float]()
    while rest or row:
        side = min(box.width, box.height)
        if rest and (not row or _worst([*row, rest[0]], side) <= _worst(row, side)):
            row.append(rest.pop(0))
            continue
        area_of_row = math.fsum(row)
        thick = min(area_of_row / side, max(box.width, box.height)) if side else 0.0
        along = 0.0
        for area in row:
            length = side * (area / area_of_row)  # not area / thick: what is left of a box may be all rounding error
            found.append(
                Box(box.x, box.y + along, thick, length)
                if box.width >= box.height
                else Box(box.x + along, box.y, length, thick)
            )
            along += length
        box = (
            Box(box.x + thick, box.y, max(0.0, box.width - thick), box.height)
            if box.width >= box.height
            else Box(box.x, box.y + thick, box.width, max(0.0, box.height - thick))
        )
        row = []
    return found


def _worst(row: Sequence[float], side: float) -> float:
    """The worst aspect ratio of areas laid along a side."""
    whole = math.fsum(row)
    return max(side * side * max(row) / (whole * whole), whole * whole / (side * side * min(row)))


def treemap(
    cells: Iterable[Cell],
    id_: str,
    write: Callable[[float], str],
    what: str,
    *,
    width: float,
    height: float,
    most: int = 60,
) -> Markup:
    """``cells`` by area, groups first, in each the largest first; ``write`` gives a value its unit, ``what`` names it.

    Of more than ``most`` the smallest of each group are drawn as one.
    """
    groups: dict[str, list[Cell]] = {}
    whole = 0.0
    for cell in cells:
        groups.setdefault(cell.group, []).append(cell)
        whole += cell.value
    ordered = _fewer(
        sorted(
            ((g, sorted(c, key=lambda c: -c.value)) for g, c in groups.items()),
            key=lambda pair: -math.fsum(c.value for c in pair[1]),
        ),
        most,
    )
    boxes = squarify([math.fsum(c.value for c in inside) for _, inside in ordered], Box(0, 0, width, height))
    drawn: list[tuple[float, Markup]] = []
    headers = []
    for (group, inside), box in zip(ordered, boxes, strict=True):
        frame = box.inset(1)
        alone = len(inside) == 1
        if not alone and frame.height > 46 and frame.width > 50:
            total = math.fsum(c.value for c in inside)
            headers.append(
                _label(
                    frame.x + 2,
                    frame.y + 13,
                    frame.width - 4,
                    (f"{group} · {format_share(total / whole)}", group),
                    "group",
                )
            )
            frame = frame.inset(0, 19)
        tone = "t-optimizer" if group == "optimizer step" else "t-outside" if group.startswith("(") else "t-module"
        for cell, place in zip(inside, squarify([c.value for c in inside], frame), strict=True):
            drawn.append((cell.value, _cell(cell, place.inset(0.5), tone, write, whole)))
    drawn.sort(key=lambda pair: -pair[0])
    title = f"{what} by module"
    largest = "; ".join(f"{g} {format_share(math.fsum(c.value for c in inside) / whole)}" for g, inside in ordered[:4])
    about = f"{title}, {write(whole)} in all: {largest}" if whole else f"{title}: none"
    return svg(id_, width, height, title, about, *headers, *(m for _, m in drawn), class_="plot treemap")


def _fewer(groups: list[tuple[str, list[Cell]]], most: int) -> list[tuple[str, list[Cell]]]:
    """At most about ``most`` cells: a group's tail becomes one cell, and groups that are all tail one together."""
    if sum(len(inside) for _, inside in groups) <= most:
        return groups
    cut = sorted((c.value for _, inside in groups for c in inside), reverse=True)[most - 1]
    found: list[tuple[str, list[Cell]]] = []
    rest = Cell("", "", 0, 0.0)
    for group, inside in groups:
        kept = [c for c in inside if c.value > cut]
        tail = [c for c in inside if c.value <= cut]
        if not kept:
            copies = rest.copies + sum(c.copies for c in inside)
            rest = Cell("", f"{copies} more", copies, rest.value + math.fsum(c.value for c in inside))
            continue
        if tail:
            copies = sum(c.copies for c in tail)
            kept.append(Cell(group, f"{copies} more", copies, math.fsum(c.value for c in tail)))
        found.append((group, kept))
    return [*found, *([("(other)", [rest])] if rest.value else [])]


def _cell(cell: Cell, box: Box, tone: str, write: Callable[[float], str], whole: float) -> Markup:
    name = clipped(".".join(part for part in (cell.group, cell.name) if part))
    each = f", {cell.copies} alike, {write(cell.value / cell.copies)} each" if cell.copies > 1 and cell.name else ""
    share = format_share(cell.value / whole)
    said = f"{name}: {write(cell.value)}, {share}{each}"
    rect = tag("rect", x=box.x, y=box.y, width=max(0.0, box.width), height=max(0.0, box.height))
    short = (cell.name or cell.group).rpartition(".")[2]
    names = (cell.name or cell.group, short)
    words = []
    if box.height > 17 and box.width > 26:
        words.append(_label(box.x + 5, box.y + 14, box.width - 8, names, "name"))
        if box.height > 34:
            words.append(
                _label(box.x + 5, box.y + 29, box.width - 8, (f"{write(cell.value)} · {share}", share), "value")
            )
    return tag("g", tag("title", said), rect, *words, class_=f"mark {tone}", data_m="")


def _label(x: float, y: float, room: float, wordings: Sequence[str], class_: str, size: float = 12) -> Markup | None:
    """The first wording that fits in ``room``; the last is cut to fit, and left out where three letters do not."""
    for words in wordings:
        if _wide(words, size) <= room:
            return _text(x, y, words, class_)
    letters = int(room / (size * _LETTER)) - 1
    return _text(x, y, wordings[-1][:letters] + "…", class_) if letters >= 3 else None


# ------------------------------------------------------------------------------------------------------------ roofline


def roofline(
    ops: Sequence[Ops],
    id_: str,
    peaks: Mapping[str, float],
    bytes_per_s: float,
    *,
    width: float,
    height: float,
    most: int = 200,
    device: str = "",
) -> Markup:
    """Ops by arithmetic intensity and the FLOP/s they reach; a mark's area is its time.

    ``peaks`` are dense FLOP/s by dtype: a roof is drawn for each dtype that is multiplied in. Ops without FLOPs have no
    place here; the ``most`` longest are drawn. Those not forecast by themselves stand on the roof, their bound.
    """
    drawn = [o for o in ops if o.flops and o.seconds and math.isfinite(o.intensity)][:most]
    used = {o.dtype: peaks[o.dtype] for o in drawn if _GROUPS.get(o.kind) == "products" and o.dtype in peaks}
    used = used or dict(list(peaks.items())[:1])
    reached = [o.flops / o.seconds for o in drawn]
    ridge = max(used.values(), default=1.0) / bytes_per_s
    low_x = math.floor(math.log10(min([o.intensity for o in drawn] + [ridge / 100])))
    high_x = math.ceil(math.log10(max([o.intensity for o in drawn] + [ridge * 5])))
    low_y = math.floor(math.log10(min([*reached, bytes_per_s * 10.0**low_x])))
    high_y = math.log10(max([*used.values(), *reached])) + 0.35
    frame = Box(64, 14, width - 64 - 10, height - 14 - 44)

    def x(intensity: float) -> float:
        return frame.x + frame.width * (math.log10(intensity) - low_x) / (high_x - low_x)

    def y(flops_per_s: float) -> float:
        return frame.y + frame.height * (1 - (math.log10(flops_per_s) - low_y) / (high_y - low_y))

    grid = []
    thin = 2 if high_x - low_x > 7 or width < 500 else 1
    for power in range(low_x, high_x + 1, thin):
        at = x(10.0**power)
        grid += [
            tag("line", x1=at, x2=at, y1=frame.y, y2=frame.y + frame.height, class_="grid"),
            _text(at, frame.y + frame.height + 17, _power(power), "tick", "middle"),
        ]
    for power in range(low_y, int(high_y) + 1, 1 if high_y - low_y < 6 else 2):
        grid += [
            tag("line", x1=frame.x, x2=frame.x + frame.width, y1=y(10.0**power), y2=y(10.0**power), class_="grid"),
            _text(
                frame.x - 8,
                y(10.0**power) + 4,
                format_rate(10**power, "FLOP").removesuffix("FLOP/s") if power >= 0 else _power(power),
                "tick",
                "end",
            ),
        ]
    grid += [
        _text(frame.x + frame.width, frame.y + frame.height + 36, "FLOP per byte moved", "tick", "end"),
        _text(2, frame.y + frame.height + 36, "FLOP/s, upwards", "tick"),
    ]
    roofs, taken = [], list[Box]()
    for dtype, peak in used.items():
        bend = peak / bytes_per_s
        path = (
            f"M{x(10.0**low_x):.1f} {y(bytes_per_s * 10.0**low_x):.1f}L{x(bend):.1f} {y(peak):.1f}"
            f"H{frame.x + frame.width:.1f}"
        )
        words = f"{dtype} {format_rate(peak, 'FLOP')}"
        right, wide = frame.x + frame.width - 4, _wide(words, 12)
        taken.append(Box(right - wide, y(peak) - 18, wide, 16))
        roofs += [tag("path", d=path, class_="roof"), _text(right, y(peak) - 6, words, "halo", "end")]
    whole = math.fsum(o.seconds for o in ops) or 1.0
    largest = (width / 18) ** 2
    marks, names, placed = [], list[Markup](), []
    for o, rate in zip(drawn, reached, strict=True):
        share = o.seconds / whole
        r = max(2.5, math.sqrt(largest * share))
        place = (x(o.intensity), y(rate))
        said = (
            f"{o.op} ({o.kind}, {o.phase}) in {place_of(o)}: {o.calls:,} call{'' if o.calls == 1 else 's'}, "
            f"{format_seconds(o.seconds)}, {format_share(share)} of the time, bound by {o.bound}; "
            f"{ratio(o.intensity)} FLOP/B, {format_flops(o.flops)}, {format_bytes(o.moved_bytes)}"
        )
        marks.append(
            tag(
                "circle",
                tag("title", said),
                cx=place[0],
                cy=place[1],
                r=r,
                data_m="",
                class_=f"mark k-{_GROUPS.get(o.kind, 'vector')}",
            )
        )
        placed.append((o, place, r, share))
        taken.append(Box(place[0] - r, place[1] - r, 2 * r, 2 * r))
    for o, place, r, share in placed:
        if len(names) < 5 and share > 0.02:
            names += _named(o, place, r, frame, taken)
    about = (
        f"{len(drawn)} groups of calls under the roofs of {device or 'the device'}; "
        f"memory {format_rate(bytes_per_s, 'B')}, "
        + ", ".join(f"{d} {format_rate(p, 'FLOP')}" for d, p in used.items())
    )
    # small marks last, so that none lies hidden below a large one; the order of the titles stays that of time
    return svg(id_, width, height, "Ops on the roofline", about, *grid, *roofs, *marks, *names, class_="plot roofline")


def _named(o: Ops, place: tuple[float, float], r: float, frame: Box, taken: list[Box]) -> list[Markup]:
    """The op's name beside its mark, where no other name stands."""
    last = o.module.rpartition(".")[2]
    words = f"{(o.module if last == '*' else last) or o.op.removeprefix('aten.')} {o.phase}"
    wide = _wide(words, 12)
    for x, anchor in ((place[0] - r - 5 - wide, "end"), (place[0] + r + 5, "start")):
        for dy in (4, 20, -12, 36, -28):
            box = Box(x, place[1] + dy - 11, wide, 14)
            inside = frame.x <= box.x and box.x + box.width <= frame.x + frame.width and box.y > frame.y
            if inside and box.y + 14 < frame.y + frame.height and not any(_touch(box, other) for other in taken):
                taken.append(box)
                return [_text(x + wide if anchor == "end" else x, place[1] + dy, words, "halo name", anchor)]
    return []


def place_of(o: Ops) -> str:
    """The module of ops alike, or what stands for one."""
    return clipped(o.module) or ("optimizer step" if o.phase == "optimizer" else "(outside modules)")


def ratio(x: float) -> str:
    """A plain number to about three digits.

    >>> ratio(2489.6), ratio(0.3333)
    ('2,490', '0.333')
    """
    return f"{float(f'{x:.3g}'):,.0f}" if x >= 100 else f"{x:.3g}"


def _touch(a: Box, b: Box) -> bool:
    return a.x < b.x + b.width and b.x < a.x + a.width and a.y < b.y + b.height and b.y < a.y + a.height


_UP = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _power(n: int) -> str:
    """Ten to the power of ``n`` as a tick says it.

    >>> _power(-1), _power(2), _power(4)
    ('0.1', '100', '10⁴')
    """
    return f"{10.0**n:g}" if -3 < n < 4 else "10" + str(n).translate(_UP)


# ---------------------------------------------------------------------------------------------------------------- bars


def bar(
    parts: Iterable[tuple[str, float, str]], id_: str, title: str, *, width: float = 920, height: float = 22
) -> Markup:
    """(class, value, words) one after the other along one bar; the words are each part's title."""
    found = [p for p in parts if p[1] > 0]
    whole = math.fsum(v for _, v, _ in found) or 1.0
    drawn, at = [], 0.0
    for class_, value, words in found:
        wide = width * value / whole
        drawn.append(
            tag(
                "rect",
                tag("title", words),
                x=at,
                y=0,
                width=max(0.6, wide - 1),
                height=height,
                class_=f"mark {class_}",
                data_m="",
            )
        )
        at += wide
    about = "; ".join(words for _, _, words in found)
    return svg(id_, width, height, title, about or title, *drawn, class_="plot bar")


def share_bar(share: float, width: float = 48) -> Markup:
    """A share of 1 as a short bar in a cell: the number beside it says the same, so screen readers pass it over."""
    return tag(
        "svg",
        tag("rect", width=width, height=6, class_="track"),
        tag("rect", width=max(0.0, min(1.0, share)) * width, height=6, class_="fill"),
        viewBox=f"0 0 {width:g} 6",
        width=width,
        height=6,
        class_="share",
        aria_hidden="true",
    )
