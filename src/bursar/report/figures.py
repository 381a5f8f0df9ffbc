"""What the pictures of a step show: its timeline thinned, its ops merged, its peak taken apart. Drawn elsewhere.

Everything here is a grouping of the ledger's rows and storages: nothing is counted anew, and what is thinned keeps the
peak exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bursar.ledger import Ledger, Row
from bursar.memory import CLASSES
from bursar.modules import OPTIMIZER, Share, joined, numbered, owners_at_peak
from bursar.roofline import Forecast, op_seconds


@dataclass(frozen=True, slots=True)
class Moment:
    """An instant of the step: where it stands (0 to 1), the op at work, live bytes by class in CLASSES' order."""

    at: float
    row: int  # of `Ledger.recorded`; -1 before the step
    live: tuple[int, ...]

    @property
    def total(self) -> int:
        """Live bytes."""
        return sum(self.live)


@dataclass(frozen=True, slots=True)
class Course:
    """Live bytes over a step: in each of equal stretches the fullest moment, so that the peak is one of them."""

    moments: tuple[Moment, ...]
    peak: int  # which moment is the step's peak
    phases: tuple[tuple[str, float, float], ...]  # (phase, from, to), 0 to 1
    seconds: float | None  # the length of the axis; None where it is counted in ops
    ops: int

    @property
    def peak_bytes(self) -> int:
        """The peak, as `Memory.peak_bytes`."""
        return self.moments[self.peak].total


@dataclass(frozen=True, slots=True)
class Ops:
    """Calls alike of one op: the same work in the same phase, in modules that differ in their number alone."""

    op: str
    kind: str
    phase: str
    dtype: str
    module: str
    calls: int
    flops: int  # together, recompute included
    moved_bytes: int
    compute_seconds: float  # together, at the device's peak; 0 without a device
    memory_seconds: float
    forecast_seconds: float | None = None  # together, where the forecast priced each op by itself

    @property
    def roofline_seconds(self) -> float:
        """The longer of the two: the bound."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def seconds(self) -> float:
        """What is forecast for them by themselves, else the bound."""
        return self.roofline_seconds if self.forecast_seconds is None else self.forecast_seconds

    @property
    def bound(self) -> str:
        """What binds them."""
        return "compute" if self.compute_seconds >= self.memory_seconds else "memory"

    @property
    def intensity(self) -> float:
        """FLOP per byte moved; infinite where nothing is moved."""
        return self.flops / self.moved_bytes if self.moved_bytes else math.inf


@dataclass(frozen=True, slots=True)
class Kind:
    """All ops of one kind."""

    kind: str
    calls: int
    flops: int
    moved_bytes: int
    seconds: float  # as of `Ops`


@dataclass(frozen=True, slots=True)
class Held:
    """What stands at the peak in one class and of one module, or of several alike."""

    memory_class: str
    module: str
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Cell:
    """A part of a treemap: the group it stands in, its name there, how many it is, and what it weighs."""

    group: str
    name: str
    copies: int
    value: float


def row_seconds(ledger: Ledger, forecast: Forecast) -> list[float]:
    """Seconds of each recorded row, which add up to the forecast less what it waits for the network.

    Where the forecast did not price each row by itself, its excess over the roofline is shared out in proportion to
    each row's bound.
    """
    if len(forecast.row_seconds) == len(ledger):
        return list(forecast.row_seconds)
    device = forecast.cluster.accelerator
    bound = [max(op_seconds(row, device)) for row in ledger.recorded]
    whole = math.fsum(bound)
    stretch = (forecast.seconds - forecast.bound_by.get("network", 0.0)) / whole if whole else 0.0
    return [seconds * stretch for seconds in bound]


def course(ledger: Ledger, seconds: Sequence[float] | None, columns: int) -> Course:
    """The step's memory in ``columns`` stretches along its ops, or along ``seconds`` of its rows."""
    import numpy as np  # here: pages that need no ledger start without it

    rows, memory = ledger.recorded, ledger.memory
    widths = np.ones(len(rows)) if seconds is None or not sum(seconds) else np.array(seconds)
    ends = np.cumsum(widths)
    whole = float(ends[-1]) if len(ends) else 1.0
    starts = (ends - widths) / whole
    base = tuple(memory.base[c] for c in CLASSES)
    live = np.stack([memory.timeline[c] for c in CLASSES], axis=1)
    totals = live.sum(axis=1)
    place = np.clip(memory.event_rows - ledger.first_row, 0, max(0, len(rows) - 1))
    at = starts[place] if len(rows) else np.zeros(0)
    moments = [Moment(0.0, -1, base)]
    edges = np.searchsorted(at, np.arange(1, columns + 1) / columns, side="left") if len(at) else [0] * columns
    before = 0
    for column, after in enumerate(edges):
        # what the column before ended with stands until this one's first event
        first = max(0, before - 1)
        after = int(after) if column < columns - 1 else len(totals)
        if after > before or not before:
            best = first + int(totals[first:after].argmax()) if after > first else -1
        else:
            best = first
        if best >= 0:
            moments.append(Moment((column + 0.5) / columns, int(place[best]), tuple(live[best].tolist())))
        else:
            moments.append(Moment((column + 0.5) / columns, 0, base))
        before = after
    peak = max(range(len(moments)), key=lambda i: moments[i].total)
    return Course(
        tuple(moments),
        peak,
        _phases(rows, starts, ends / whole, columns),
        None if seconds is None else math.fsum(seconds),
        len(rows),
    )


def _phases(
    rows: Sequence[Row], starts: Iterable[float], ends: Iterable[float], columns: int
) -> tuple[tuple[str, float, float], ...]:
    """Which phase is at work in most of each column, neighbours merged."""
    shares: list[dict[str, float]] = [{} for _ in range(columns)]
    for row, start, end in zip(rows, starts, ends, strict=True):
        first, last = min(columns - 1, int(start * columns)), min(columns - 1, int(end * columns))
        for column in range(first, last + 1):
            within = min(end, (column + 1) / columns) - max(start, column / columns)
            shares[column][row.phase] = shares[column].get(row.phase, 0.0) + max(0.0, within)
    found: list[tuple[str, float, float]] = []
    for column, share in enumerate(shares):
        if not share:
            continue
        phase = max(share, key=lambda p: share[p])
        if found and found[-1][0] == phase:
            found[-1] = (phase, found[-1][1], (column + 1) / columns)
        else:
            found.append((phase, column / columns, (column + 1) / columns))
    return tuple(found)


def merged(ledger: Ledger, forecast: Forecast | None = None) -> list[Ops]:
    """The step's ops, calls alike as one; the longest first, without a device those that move most."""
    device = None if forecast is None else forecast.cluster.accelerator
    totals: dict[tuple[str, str, str, str, str, int, int], list[float]] = {}
    where: dict[tuple[str, str, str, str, str, int, int], dict[str, None]] = {}
    priced = forecast.row_seconds if forecast is not None and len(forecast.row_seconds) == len(ledger) else ()
    for i, row in enumerate(ledger.recorded):
        work = row.work
        flops, moved = work.flops + work.recompute_flops, work.read_bytes + work.written_bytes
        key = (row.op, row.kind, row.phase, row.dtype, _anywhere(row.module), flops, moved)
        entry = totals.setdefault(key, [0, 0.0, 0.0, 0.0])
        entry[0] += 1
        where.setdefault(key, {})[row.module] = None
        if device is not None:
            compute, moving = op_seconds(row, device)
            entry[1] += compute
            entry[2] += moving
        if priced:
            entry[3] += priced[i]
    found = []
    for key, (calls, compute, moving, seconds) in totals.items():
        op, kind, phase, dtype, anywhere, flops, moved = key
        module = anywhere if len(where[key]) > 1 else next(iter(where[key]))
        n = int(calls)
        found.append(
            Ops(op, kind, phase, dtype, module, n, n * flops, n * moved, compute, moving, seconds if priced else None)
        )
    return sorted(found, key=lambda o: (-o.seconds, -o.moved_bytes))


def _anywhere(path: str) -> str:
    """``path`` with a star for its first number.

    >>> _anywhere("model.layers.7.mlp"), _anywhere("head")
    ('model.layers.*.mlp', 'head')
    """
    parts = numbered(path)
    return path if parts is None else joined(parts[0], "*", parts[2])


def kinds(ops: Iterable[Ops]) -> list[Kind]:
    """The same by kind, the longest first."""
    totals: dict[str, list[float]] = {}
    for o in ops:
        entry = totals.setdefault(o.kind, [0, 0, 0, 0.0])
        for i, n in enumerate((o.calls, o.flops, o.moved_bytes, o.seconds)):
            entry[i] += n
    found = (Kind(kind, int(e[0]), int(e[1]), int(e[2]), e[3]) for kind, e in totals.items())
    return sorted(found, key=lambda k: (-k.seconds, -k.moved_bytes, k.kind))


def held(ledger: Ledger) -> list[Held]:
    """The peak by class and module, modules that differ in their number alone together, the largest first."""
    found: dict[tuple[str, str], int] = {}
    places: dict[tuple[str, str], dict[str, None]] = {}
    for (memory_class, module), n_bytes in owners_at_peak(ledger).items():
        key = (memory_class, _anywhere(module))
        found[key] = found.get(key, 0) + n_bytes
        places.setdefault(key, {})[module] = None
    return sorted(
        (
            Held(c, where if len(places[c, where]) > 1 else next(iter(places[c, where])), n)
            for (c, where), n in found.items()
        ),
        key=lambda h: (-h.n_bytes, h.memory_class, h.module),
    )


def cells(shares: Iterable[Share], weigh: str) -> list[Cell]:
    """``shares`` as parts of a treemap by their field ``weigh``: blocks of one list share a group; no zeros."""
    found = []
    for share in shares:
        value = share.copies * (getattr(share, weigh) or 0)
        if not value:
            continue
        parts = numbered(share.module)
        if share.module == OPTIMIZER or not share.module:
            group, name = share.module or "(outside modules)", ""
        elif parts is not None:
            stem, first, rest = parts
            span = f"{first}" if share.copies == 1 else f"{first}–{first + share.copies - 1}"
            group, name = stem or "blocks", f"{span}.{rest}" if rest else span
        else:
            group, _, name = share.module.partition(".")
        found.append(Cell(group, name, share.copies, value))
    return found
