"""A step as a trace that Perfetto and chrome://tracing open: ops end to end, phases above them, memory below.

Google's Trace Event Format, the JSON kind: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bursar.errors import printable
from bursar.ledger import Ledger, Row
from bursar.memory import CLASSES
from bursar.report.figures import row_seconds
from bursar.roofline import Forecast, op_seconds

PHASES, COMPUTE, NETWORK = 1, 2, 3  # the tracks, as thread ids
_SHAPES = 6  # shown of one op: an optimizer's list kernel has thousands
_NS_OF_AN_OP = 1000  # without a device every op is as wide as the next


def trace(ledger: Ledger, forecast: Forecast | None = None) -> dict[str, Any]:
    """The trace as an object of strict JSON. Times are microseconds from the step's start, to the nanosecond.

    With ``forecast`` each op takes its share of it; without one an op is a microsecond wide, and the trace says so.
    """
    rows = ledger.recorded
    if forecast is None:
        edges = [i * _NS_OF_AN_OP for i in range(len(rows) + 1)]
        where = "op by op: no device was named, so an op is 1 µs wide whatever it costs"
    else:
        edges = _edges(row_seconds(ledger, forecast))
        where = f"forecast on {forecast.cluster.name}, {forecast.basis}"
    wait = 0 if forecast is None else round(forecast.bound_by.get("network", 0.0) * 1e9)
    first = next((i for i, row in enumerate(rows) if row.phase == "optimizer"), len(rows))
    if wait:  # gradients are reduced while backward runs; the optimizer waits for what is left
        edges = [at + (wait if i >= first else 0) for i, at in enumerate(edges)]
    name = printable(f"bursar: {ledger.model.name or 'a step'}, {where}", keep="")
    events = [
        _meta("process_name", 0, name),
        _meta("thread_name", PHASES, "phases"),
        _meta("thread_name", COMPUTE, "compute stream"),
    ]
    if wait:
        events.append(_meta("thread_name", NETWORK, "network, what backward does not hide"))
        sent = {f"{c.op} bytes per rank": c.bytes for c in forecast.collectives} if forecast else {}
        begin = edges[first] - wait if first < len(edges) else edges[-1]
        events.append(_slice("wait for the network", "network", NETWORK, begin, begin + wait, sent))
    ends = [*edges[1:]]
    if wait and 0 < first < len(edges):
        ends[first - 1] -= wait
    events += sorted(
        [*_ops(rows, edges, ends, forecast), *_phases(rows, edges, ends), *_memory(ledger, edges)],
        key=lambda e: e["ts"],
    )
    assumptions = [*ledger.assumptions, *(forecast.assumptions if forecast else ())]
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "what": name,
            "assumptions": [printable(text, keep="") for text in assumptions],
            **{f"version of {k}": v for k, v in ledger.versions.items()},
        },
    }


def _edges(seconds: Sequence[float]) -> list[int]:
    """Nanoseconds at which the ops begin and the last ends: the sum is rounded, so that nothing overlaps."""
    edges, total = [0], 0.0
    for s in seconds:
        total += s
        edges.append(round(total * 1e9))
    return edges


def _meta(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 1, "tid": thread, "ts": 0, "args": {"name": name}}


def _slice(name: str, category: str, thread: int, begin: int, end: int, args: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "pid": 1,
        "tid": thread,
        "ts": begin / 1000,
        "dur": (end - begin) / 1000,
        "args": args,
    }


def _ops(
    rows: Sequence[Row], begins: Sequence[int], ends: Sequence[int], forecast: Forecast | None
) -> Iterator[dict[str, Any]]:
    for row, begin, end in zip(rows, begins, ends, strict=False):
        work = row.work
        args: dict[str, Any] = {
            "module": printable(row.module, keep=""),
            "phase": row.phase,
            "dtype": row.dtype,
            "flops": work.flops + work.recompute_flops if row.kind != "uncounted" else "unknown: no rule",
            "bytes": work.read_bytes + work.written_bytes,
            "shapes": " ".join("×".join(map(str, s)) or "scalar" for s in row.shapes[:_SHAPES])
            + (f" and {len(row.shapes) - _SHAPES} more" if len(row.shapes) > _SHAPES else ""),
        }
        if forecast is not None:
            compute, moving = op_seconds(row, forecast.cluster.accelerator)
            args["roofline_us"] = max(compute, moving) * 1e6
            args["bound_by"] = "compute" if compute >= moving else "memory"
        yield _slice(row.op, row.kind, COMPUTE, begin, end, args)


def _phases(rows: Sequence[Row], begins: Sequence[int], ends: Sequence[int]) -> Iterator[dict[str, Any]]:
    start = 0
    for i, row in enumerate(rows):
        if i + 1 == len(rows) or rows[i + 1].phase != row.phase:
            yield _slice(row.phase, "phase", PHASES, begins[start], ends[i], {"ops": i + 1 - start})
            start = i + 1


def _memory(ledger: Ledger, edges: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Live bytes by class as a counter: at an op's begin the fullest moment in it, so that the most is the peak."""
    memory = ledger.memory
    live = {c: memory.timeline[c].tolist() for c in CLASSES}
    places = (memory.event_rows - ledger.first_row).tolist()
    last = max(0, len(edges) - 2)

    def counter(ns: int, values: dict[str, int]) -> dict[str, Any]:
        return {"name": "live bytes", "ph": "C", "pid": 1, "tid": 0, "ts": ns / 1000, "args": values}

    yield counter(0, {c: memory.base[c] for c in CLASSES})
    i = 0
    while i < len(places):
        end = i
        while end + 1 < len(places) and places[end + 1] == places[i]:
            end += 1
        row = min(max(0, places[i]), last)
        fullest = max(range(i, end + 1), key=lambda k: sum(live[c][k] for c in CLASSES))
        yield counter(edges[row], {c: live[c][fullest] for c in CLASSES})
        following = places[end + 1] if end + 1 < len(places) else None
        if fullest != end and following != places[i] + 1:  # else the next op's own moment says what is left
            yield counter(edges[min(row + 1, len(edges) - 1)], {c: live[c][end] for c in CLASSES})
        i = end + 1
