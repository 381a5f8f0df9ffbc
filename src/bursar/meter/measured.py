"""The real step on this machine: its FLOPs op by op, its peak by the allocator's record, its seconds op by op.

The seconds of an op come from torch's profiler. Its stream and the traced one are the same ops in the same order, so a
row of the ledger finds its op by walking along both: names, phases and modules are the ledger's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from bursar import machine
from bursar.bench import prepared
from bursar.errors import NoAnswer
from bursar.ledger import Ledger
from bursar.meter import memory
from bursar.meter.flops import FlopMeter
from bursar.reconcile import Measured
from bursar.units import format_bytes
from bursar.workload.resolve import Workload, tensors_in
from bursar.workload.step import real

WARM_UP, LEAST, MOST = 2, 5, 50  # steps
BUDGET_SECONDS = 5.0  # for the timed steps, once LEAST of them are done
UNEVEN = 0.3  # steps whose slower quarter takes this much longer than the quicker: no accuracy is claimed
BUSY = 1.15  # a product that takes this much longer after the steps than before: the machine was doing something else


def measure(work: Workload, ledger: Ledger, device: torch.device, **options: Any) -> Measured:
    """Run the step that ``ledger`` forecast, ``options`` as `workload.step.real` takes them.

    Nothing of the process is left changed but its random state. Raises NoAnswer for a step whose forecast peak is more
    than this machine has, and whatever the model's own code raises.
    """
    needed, has = ledger.memory.peak_bytes, memory.there_are(device)
    if needed > has:
        raise NoAnswer(
            f"the step needs {format_bytes(needed)} and this machine has {format_bytes(has)} free; "
            "measure a smaller batch"
        )
    module, batch, optimizer, step = real(work, device, **options)
    with prepared():
        for _ in range(WARM_UP):
            step()
        with FlopMeter(device) as flops:
            step()
        peak = memory.PeakMeter()
        with peak.watch(device, [*memory.standing(module, optimizer), *_gradients(module), *tensors_in(batch)]):
            step()
        before = _canaries(device)
        timed = _timed(step, device)
        after = _canaries(device)
        profiled = _middle([_profiled(step, ledger, device) for _ in range(_profiles(timed))])
    notes = []
    if timed.dropped:
        notes.append(f"{timed.dropped} intervals of no or negative length were left out: the clock was set back")
    if any(not bool(p.isfinite().all()) for p in module.parameters()):
        notes.append(
            "a weight is no number any more: the loss became NaN on the way; the seconds stand, a loss does not"
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine.cpu_name()
    return Measured(device.type, name, flops.model, flops.hardware, peak.bytes, timed.walls, timed.cpu, profiled.rows,
                    _busy(before, after, timed), timed.threads if device.type == "cpu" else (), torch.get_num_threads(),
                    profiled.spans, profiled.allocated, tuple(notes))  # fmt: skip


def _busy(before: tuple[float, ...], after: tuple[float, ...], timed: _Timed) -> str:
    """Why the seconds are not to be trusted: a canary that slowed down, or steps that differ; empty where they are."""
    for name, a, b in zip(("a product", "a pass over memory"), before, after, strict=True):
        if max(a, b) > BUSY * min(a, b):
            return f"the machine was busy: {name} took {max(a, b) / min(a, b):.2f} times as long once"
    quarters = statistics.quantiles(timed.walls, n=4) if len(timed.walls) > 2 else [1.0, 1.0, 1.0]
    if quarters[2] > (1 + UNEVEN) * quarters[0]:
        return f"the machine was busy: a quarter of the steps took {quarters[2] / quarters[0]:.2f} times a quarter's"
    return ""


def _gradients(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Timed(NamedTuple):
    """Wall and thread's CPU seconds of each step, a step's CPU seconds over all threads, intervals left out."""

    walls: tuple[float, ...]
    threads: tuple[float, ...]
    cpu: float
    dropped: int


def _timed(step: Callable[[], None], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> _Timed:
    """Time some steps. Raises NoAnswer where the clock stands or runs backwards all the time."""
    walls: list[float] = []
    threads: list[float] = []
    dropped, cpu = 0, time.process_time()
    while len(walls) < LEAST or (len(walls) < MOST and sum(walls) < BUDGET_SECONDS):
        _wait(device)
        thread, began = time.thread_time(), clock()
        step()
        _wait(device)
        took = clock() - began
        if took > 0:
            walls.append(took)
            threads.append(time.thread_time() - thread)
            continue
        dropped += 1
        if dropped > MOST:
            raise NoAnswer("the clock stands or is set back: no step took any time by it; measure again")
    return _Timed(tuple(walls), tuple(threads), (time.process_time() - cpu) / (len(walls) + dropped), dropped)


def _canaries(device: torch.device) -> tuple[float, float]:
    """Seconds of a product and of a pass over memory that are always the same: medians of some."""
    a, b = torch.ones(512, 512, device=device), torch.ones(3 * 2**20, device=device)
    found = []
    runs: tuple[Callable[[], Any], ...] = (lambda: a @ a, lambda: b.mul_(1.0))
    for run in runs:
        times = []
        for _ in range(9):
            _wait(device)
            began = time.perf_counter()
            run()
            _wait(device)
            times.append(time.perf_counter() - began)
        found.append(statistics.median(times))
    return found[0], found[1]


class _Profiled(NamedTuple):
    """By row of the ledger: its op's seconds, the seconds from the op before's end to its own, the bytes it kept."""

    rows: tuple[float | None, ...]
    spans: tuple[float | None, ...]
    allocated: tuple[int | None, ...]


def _profiles(timed: _Timed) -> int:
    """How many steps to profile: as many as the time for measuring allows, five at most."""
    return max(1, min(5, int(BUDGET_SECONDS / 4 / statistics.median(timed.walls))))


def _middle(found: list[_Profiled]) -> _Profiled:
    """Of each row the median of the profiles that show it."""

    def middle(column: tuple[Any, ...]) -> Any:
        known = [x for x in column if x is not None]
        return statistics.median_low(known) if known else None

    return _Profiled(*(tuple(map(middle, zip(*field, strict=True))) for field in zip(*found, strict=True)))


def _profiled(step: Callable[[], None], ledger: Ledger, device: torch.device) -> _Profiled:
    """Each row of ``ledger`` in one profiled step."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    run = profile(activities=activities, profile_memory=True)
    with memory._hushed():
        run.start()
    try:
        step()
        _wait(device)
    finally:
        with memory._hushed():
            run.stop()
    events = [e for e in run.events() if e.name.startswith("aten::") and e.device_type == torch.profiler.DeviceType.CPU]
    events.sort(key=lambda e: (e.time_range.start, -e.time_range.end))
    took = [(e.name, e.time_range.start, e.time_range.end, e.device_time_total if cuda else e.cpu_time_total)
            for e in events]  # fmt: skip
    found = _matched([r.op for r in ledger.recorded], took)
    rows = tuple(None if i is None else took[i][3] / 1e6 for i in found)
    spans: list[float | None] = []
    until = events[0].time_range.start if events else 0.0
    for i in found:
        spans.append(None if i is None else max(0.0, took[i][2] - until) / 1e6)
        until = until if i is None else max(until, took[i][2])
    kept = tuple(None if i is None else int(events[i].device_memory_usage if cuda else events[i].cpu_memory_usage)
                 for i in found)  # fmt: skip
    return _Profiled(rows, tuple(spans), kept)


def _matched(ops: list[str], events: list[tuple[str, float, float, float]], look: int = 60) -> tuple[int | None, ...]:
    """The place of the event each op is, in order; what an op does inside itself is passed over.

    ``events`` are (name, start, end, microseconds), sorted by start. An op is looked for among the next ``look`` of
    those that any op could be. In place or not is all one: autograd adds up two gradients in place where nobody else
    holds the first, and never into a fake tensor.
    """
    rows = [f"aten::{op.partition('.')[2].rstrip('_')}" for op in ops]
    names = set(rows)
    known = [(name, e[1], e[2], place) for place, e in enumerate(events) if (name := e[0].rstrip("_")) in names]
    found: list[int | None] = []
    at, until = 0, float("-inf")
    for name in rows:
        i = at
        while i < len(known) and i < at + look and not (known[i][0] == name and known[i][1] >= until):
            i += 1
        if i < len(known) and i < at + look:
            found.append(known[i][3])
            at, until = i + 1, known[i][2]
        else:
            found.append(None)
    return tuple(found)
