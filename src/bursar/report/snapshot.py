"""A step's memory as torch's own viewer reads it: the pickle that pytorch.org/memory_viz takes. Written, never read.

The layout is that of ``torch.cuda.memory._snapshot()`` (torch/cuda/memory.py, "Snapshot"), with the categories that
``torch/utils/viz/MemoryViz.js`` colours by. Its reader is a small unpickler in JavaScript that knows protocols 2 to 4
and few opcodes: plain lists, dicts, strings and ints are within them.
"""

from __future__ import annotations

import bisect
import itertools
import pickle
from typing import Any

import numpy as np

from bursar import allocator
from bursar.errors import printable
from bursar.ledger import Ledger
from bursar.report.figures import row_seconds
from bursar.roofline import Forecast

_BASE = 0x7F00_0000_0000  # where CUDA's addresses look to begin


def snapshot(ledger: Ledger, forecast: Forecast | None = None) -> dict[str, Any]:
    """One device's allocations over the step, at the addresses that the caching allocator would give them.

    What stands before the step is allocated first. An allocation's frame is its op, the module and the row as the line;
    times are the forecast's, or one microsecond an op.
    """
    rows, memory = ledger.recorded, ledger.memory
    seconds = [1e-6] * len(rows) if forecast is None else row_seconds(ledger, forecast)
    at = [0, *(round(t * 1e6) for t in itertools.accumulate(seconds))]
    events = [(-1, storage, n) for storage, n in memory.base_storages]
    events += zip(
        (memory.event_rows - ledger.first_row).tolist(),
        memory.event_storages.tolist(),
        memory.event_deltas.tolist(),
        strict=True,
    )
    trace: list[dict[str, Any]] = []
    segments: list[dict[str, Any]] = []
    live: dict[int, tuple[int, int, list[dict[str, Any]]]] = {}  # address: (rounded, asked for, frames)
    table = np.array(events, np.int64).reshape(-1, 3)
    for placed in allocator.placements(table[:, 1], table[:, 2]):
        row, storage, _ = events[placed.event]
        when = at[min(max(0, row), len(at) - 1)]
        frames, category = _frames(ledger, storage, row), _category(ledger, storage)
        address = _BASE + placed.address
        entry = {"addr": address, "stream": 0, "time_us": when, "frames": frames}
        if placed.segment is not None:
            begins, size = _BASE + placed.segment[0], placed.segment[1]
            trace.append({**entry, "action": "segment_alloc", "addr": begins, "size": size})
            segments.append(_segment(begins, size))
        if placed.asked_bytes > 0:
            live[address] = (placed.n_bytes, placed.asked_bytes, frames)
            trace.append({**entry, "action": "alloc", "size": placed.asked_bytes, "category": category})
        else:
            _, asked, made = live.pop(address)
            trace += (
                {**entry, "action": action, "size": asked, "frames": made, "category": category}
                for action in ("free_requested", "free_completed")
            )
    # the viewer fails on a trace with categories in which none is "unknown" (it misspells its own list)
    trace.append(
        {
            "action": "snapshot",
            "addr": 0,
            "size": 0,
            "stream": 0,
            "time_us": at[-1],
            "frames": [],
            "category": "unknown",
        }
    )
    addresses = sorted(live)
    for segment in segments:
        begin, end = (bisect.bisect_left(addresses, segment["address"] + n) for n in (0, segment["total_size"]))
        _fill(segment, {a: live[a] for a in addresses[begin:end]})
    return {"segments": segments, "device_traces": [trace], "allocator_settings": {}, "external_annotations": []}


def dumps(ledger: Ledger, forecast: Forecast | None = None) -> bytes:
    """`snapshot` as the file."""
    return pickle.dumps(snapshot(ledger, forecast), protocol=4)


def _frames(ledger: Ledger, storage: int, row: int) -> list[dict[str, Any]]:
    if storage < 0:
        return [{"filename": "(all modules)", "line": 0, "name": "DDP's gradient buckets"}]
    made = ledger.storages[storage]
    line = max(0, made.row - ledger.first_row)
    where = printable(made.module or made.name or "(outside modules)", keep="")
    return [
        {"filename": where, "line": line, "name": made.op or "made before the step"},
        {"filename": "phase", "line": line, "name": made.phase},
    ]


def _category(ledger: Ledger, storage: int) -> str:
    return "gradients" if storage < 0 else ledger.storages[storage].memory_class or "temporary"


def _segment(address: int, n_bytes: int) -> dict[str, Any]:
    return {
        "device": 0,
        "address": address,
        "total_size": n_bytes,
        "stream": 0,
        "segment_pool_id": (0, 0),
        "segment_type": "small" if n_bytes <= 2 * allocator.SMALL_BYTES else "large",
        "is_expandable": False,
        "frames": [],
        "allocated_size": 0,
        "active_size": 0,
        "requested_size": 0,
        "blocks": [],
    }


def _fill(segment: dict[str, Any], live: dict[int, tuple[int, int, list[dict[str, Any]]]]) -> None:
    """Lay the segment's blocks side by side: those alive after the step, and what is free between them."""
    at, end = segment["address"], segment["address"] + segment["total_size"]
    for address, (size, asked, frames) in live.items():
        if address > at:
            segment["blocks"].append(_block(at, address - at))
        segment["blocks"].append(
            {**_block(address, size), "state": "active_allocated", "requested_size": asked, "frames": frames}
        )
        segment["allocated_size"] += size
        segment["active_size"] += size
        segment["requested_size"] += asked
        at = address + size
    if at < end:
        segment["blocks"].append(_block(at, end - at))


def _block(address: int, n_bytes: int) -> dict[str, Any]:
    return {"address": address, "size": n_bytes, "requested_size": n_bytes, "state": "inactive", "frames": []}
