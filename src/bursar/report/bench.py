"""Page and JSON of ``bursar bench``: what was measured, and with ``--show`` its curves in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bursar.calibration import SCHEMA, Calibration, Point
from bursar.errors import UnknownName
from bursar.hardware import by_driver_name
from bursar.report.record import SCHEMA_VERSION
from bursar.report.text import line, note, table
from bursar.units import format_bytes, format_rate, format_seconds, format_share

_COLUMNS = 36  # of a bar
_SHOWN = 10  # ops


def record(found: Calibration, path: Path) -> dict[str, Any]:
    """The figures, unrounded, with where they are kept and, on a known accelerator, achieved over peak."""
    return {
        "schema_version": SCHEMA_VERSION,
        "calibration_schema": SCHEMA,
        "path": str(path),
        "date": found.date,
        "machine": {name: getattr(found.machine, name) for name in found.machine.__slots__},
        "clock": found.clock,
        "seconds": found.seconds,
        "canary": dict(found.canary),
        "drift": found.drift,
        "spread": found.spread,
        "busy": found.busy or None,
        "best_flops_per_s": {dtype: found.best(dtype) for dtype in found.matmul},
        "mfu": mfu(found),
        "matmul": found.matmul,
        "attention": found.attention,
        "convolution": found.convolution,
        "bandwidth_bytes_per_s": found.bandwidth,
        "ops": found.ops,
        "overhead_seconds": found.overhead,
        "launch_seconds": found.launch,
    }


def mfu(found: Calibration) -> dict[str, float] | None:
    """The best product over the catalogue's dense peak, by dtype; None for a device the catalogue does not know."""
    try:
        row = by_driver_name(found.machine.device)
    except UnknownName:
        return None
    return {dtype: best / row.peak_flops_per_s[dtype] for dtype in found.matmul
            if dtype in row.peak_flops_per_s and (best := found.best(dtype))}  # fmt: skip


def render(found: Calibration, path: Path, *, curves: bool = False) -> Iterator[Any]:
    """Headline figures; with ``curves`` each curve as bars."""
    me = found.machine
    yield line(f"{me.device or me.cpu}: measured {found.date}", style="bold")
    yield note(
        f"{me.host}, {me.threads} threads on {me.cores} usable cores, torch {me.torch}; by "
        + ("the thread's CPU time" if found.clock == "cpu" else "wall time")
    )
    over = mfu(found) or {}
    rows = [
        (f"matmul {dtype}", format_rate(best, "FLOP"),
         f"MFU {format_share(over[dtype])}" if dtype in over else f"best of {sum(map(len, by_layout.values()))} shapes")
        for dtype, by_layout in found.matmul.items() if (best := found.best(dtype))
    ]  # fmt: skip
    for dtype, by_way in found.attention.items():
        rows += [(f"attention {dtype} {way}", format_rate(points[-1][-1], "FLOP"), f"at {points[-1][0]:.0f} tokens")
                 for way, points in by_way.items() if points]  # fmt: skip
    rows += [(f"convolution {way}", format_share(share), "of the equivalent matmul's rate")
             for way, share in found.convolution.items()]  # fmt: skip
    for name, points in found.bandwidth.items():
        if points:
            rows.append((f"memory {name}", format_rate(points[-1][-1], "B"), f"at {format_bytes(points[-1][0])}"))
    rows += [(f"a call: {name.replace('_', ' ')}", format_seconds(abs(s)), "less than alone" if s < 0 else "")
             for name, s in found.overhead.items()]  # fmt: skip
    rows += [(f"launch of a {name.replace('_', ' ')}", format_seconds(s), "") for name, s in found.launch.items()]
    yield table("", ("", "measured", ""), rows)
    yield note(f"Took {format_seconds(found.seconds)}; repeats of a point spread by {found.spread:.1%} about the "
               f"median; canaries after over before {found.drift:.2f}.")  # fmt: skip
    yield note(f"Not to be trusted: {found.busy}." if found.busy else "The machine was quiet.")
    if not over:
        yield note("No peak is published for this device: MFU on it is against the best product measured.")
    yield note(f"Kept in {path}")
    if curves:
        yield from _curves(found)


def _curves(found: Calibration) -> Iterator[Any]:
    for dtype, by_layout in found.matmul.items():
        by_size = {m: 2 * m * n * k / s for m, n, k, s in by_layout.get("NN", ()) if m == n == k}
        yield from _bars(f"matmul {dtype}, M = N = K", {f"{m:.0f}": v for m, v in by_size.items()}, "FLOP")
    for dtype, by_way in found.attention.items():
        for way, points in by_way.items():
            yield from _bars(f"attention {dtype} {way}, by tokens", {f"{s:.0f}": v for s, v in points}, "FLOP")
    for name, points in found.bandwidth.items():
        yield from _bars(f"memory: {name}, by size", {format_bytes(b): v for b, v in points}, "B")
    for dtype, by_name in found.ops.items():
        slowest = sorted(by_name.items(), key=lambda entry: -_each(entry[1]["cold"]))[:_SHOWN]
        yield from _bars(f"ops {dtype}: the {len(slowest)} with most seconds per element, operands cold",
                         {name: _each(by["cold"]) for name, by in slowest}, "s")  # fmt: skip


def _each(points: tuple[Point, ...]) -> float:
    return points[-1][-1] / points[-1][0]


def _bars(title: str, values: Mapping[str, float], unit: str) -> Iterator[Any]:
    """One bar per figure, the longest the largest."""
    if not values:
        return
    most, width = max(values.values()), max(map(len, values))
    yield line("")
    yield line(title, style="bold")
    for name, value in values.items():
        bar = "█" * max(1, round(_COLUMNS * value / most))
        written = format_seconds(value) if unit == "s" else format_rate(value, unit)
        yield line(f"  {name:>{width}} {bar:<{_COLUMNS}} {written}")
