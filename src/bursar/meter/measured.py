"""The real step on this machine: its FLOPs op by op, its peak by the allocator's record, its seconds op by op.

The seconds of an op come from torch's profiler. Its stream and the traced one are the same ops in the same order, so a
row of the ledger finds its op by walking along both: names, phases and modules are the ledger's.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

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
    for _ in range(WARM_UP):
        step()
    with FlopMeter(device) as flops:
        step()
    peak = memory.PeakMeter()
    with peak.watch(device, [*memory.standing(module, optimizer), *_gradients(module), *tensors_in(batch)]):
        step()
    before = _canary(device)
    seconds, cpu = _timed(step, device)
    after = _canary(device)
    rows = _profiled(step, ledger, device)
    busy = ""
    if max(before, after) > BUSY * min(before, after):
        busy = f"the machine was busy: a product took {max(before, after) / min(before, after):.2f} times as long once"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return Measured(device.type, name, flops.model, flops.hardware, peak.bytes, seconds, cpu, rows, busy)


def _gradients(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(step: Callable[[], None], device: torch.device) -> tuple[tuple[float, ...], float]:
    """Wall seconds of each of some steps, and the CPU seconds of one."""
    found: list[float] = []
    cpu = time.process_time()
    while len(found) < LEAST or (len(found) < MOST and sum(found) < BUDGET_SECONDS):
        _wait(device)
        began = time.perf_counter()
        step()
        _wait(device)
        found.append(time.perf_counter() - began)
    return tuple(found), (time.process_time() - cpu) / len(found)


def _canary(device: torch.device) -> float:
    """Seconds of a product that is always the same: the median of some."""
    a = torch.ones(512, 512, device=device)
    found = []
    for _ in range(9):
        _wait(device)
        began = time.perf_counter()
        a @ a
        _wait(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def _profiled(step: Callable[[], None], ledger: Ledger, device: torch.device) -> tuple[float | None, ...]:
    """The seconds of each row of ``ledger``, from one profiled step."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    run = profile(activities=activities)
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
    return _aligned([r.op for r in ledger.recorded], took)


def _aligned(ops: list[str], events: list[tuple[str, float, float, float]], look: int = 60) -> tuple[float | None, ...]:
    """Seconds of the event each op is, in order; what an op does inside itself is passed over.

    ``events`` are (name, start, end, microseconds), sorted by start. An op is looked for among the next ``look`` of
    those that any op could be. In place or not is all one: autograd adds up two gradients in place where nobody else
    holds the first, and never into a fake tensor.
    """
    rows = [f"aten::{op.partition('.')[2].rstrip('_')}" for op in ops]
    names = set(rows)
    events = [(name, *rest) for e in events if (name := e[0].rstrip("_")) in names for rest in (e[1:],)]
    found: list[float | None] = []
    at, until = 0, float("-inf")
    for name in rows:
        i = at
        while i < len(events) and i < at + look and not (events[i][0] == name and events[i][1] >= until):
            i += 1
        if i < len(events) and i < at + look:
            found.append(events[i][3] / 1e6)
            at, until = i + 1, events[i][2]
        else:
            found.append(None)
    return tuple(found)
