"""Runs an operation on this machine: its time, the FLOP/s it reaches and, where a peak is known, its MFU.

The median of repeats after a warm-up, with their interquartile range. A small product timed before and after tells a
busy or throttled machine from a slow operation; CPU time stands beside wall time for the same reason. On a GPU the time
is that between two events in its stream. Repeats use the same tensors, so what fits a cache stays there.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bursar.errors import BadInput, UnknownName
from bursar.hardware import by_driver_name
from bursar.operation import Measured, Operation, mfu, price, shrunk
from bursar.rules import MODEL_KINDS, Tensor

__all__ = ["DTYPES", "Measured", "compare", "measure", "runner", "tensors"]

DTYPES = {
    "fp64": torch.float64, "fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16,
    "bf16": torch.bfloat16, "int64": torch.int64,
}  # fmt: skip

_MOST_SECONDS = 20.0  # one warm-up and `_FEWEST` repeats; what would take longer is made smaller
_MOST_MEMORY = 0.5  # of what is free
_FEWEST, _MOST = 3, 200  # repeats
_SAMPLE_SECONDS = 1e-3  # an operation shorter than this is run several times per repeat: the clock and the loop cost µs
_BUSY = 0.2  # a canary or a spread off by more than this is worth a note; idle 2-core machines stay within 0.1


# ------------------------------------------------------------------------------------------------------ what is run


_Run = Callable[..., torch.Tensor]


def _conv(op: Operation, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    options = {name: op.options[name] for name in ("stride", "padding", "dilation", "groups") if name in op.options}
    spatial = op.name.removeprefix("conv")
    run = getattr(F, f"conv_transpose{spatial}" if op.options.get("transposed") else op.name)
    return run(x, w, **options)  # type: ignore[no-any-return]


def _attention(op: Operation, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = None
    if (window := op.options.get("window")) is not None:
        ahead = torch.arange(q.shape[2], device=q.device)[:, None] - torch.arange(k.shape[2], device=q.device)
        mask = (ahead >= 0) & (ahead < window)
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None and op.options.get("causal", False), enable_gqa=q.shape[1] != k.shape[1]
    )


def _elementwise(op: Operation, *x: torch.Tensor) -> torch.Tensor:
    return (getattr(torch, op.name, None) or getattr(F, op.name))(*x)  # type: ignore[no-any-return]


def _reduce(op: Operation, x: torch.Tensor) -> torch.Tensor:
    run: _Run = {"max": torch.amax, "min": torch.amin, "norm": torch.linalg.vector_norm}.get(
        op.name, getattr(torch, op.name)
    )
    return run(x)


_BY_NAME: dict[str, _Run] = {
    "matmul": lambda op, a, b: torch.matmul(a, b),
    "matvec": lambda op, a, b: torch.mv(a, b),
    "einsum": lambda op, *x: torch.einsum(op.options["equation"], *x),
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
    "attention": _attention,
    "copy": lambda op, x: torch.clone(x),
    "dropout": lambda op, x: F.dropout(x, 0.1),
    **dict.fromkeys(("sum", "mean", "max", "min", "norm", "var"), _reduce),
    "softmax": lambda op, x: torch.softmax(x, -1),
    "log_softmax": lambda op, x: torch.log_softmax(x, -1),
    "layernorm": lambda op, x, w, b: F.layer_norm(x, w.shape, w, b),
    "rmsnorm": lambda op, x, w: F.rms_norm(x, w.shape, w),
    "cross_entropy": lambda op, x, target: F.cross_entropy(x, target),
    "mse": lambda op, x, y: F.mse_loss(x, y),
    "embedding": lambda op, table, indices: F.embedding(indices, table),
}
_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "adagrad": torch.optim.Adagrad,
    "momentum": lambda p, **kw: torch.optim.SGD(p, momentum=0.9, **kw),
}


def runner(operation: Operation, inputs: Sequence[torch.Tensor]) -> Callable[[], Any]:
    """What runs ``operation`` once on ``inputs``; for a backward, its forward has been run already."""
    if operation.name in _OPTIMIZERS:
        p = inputs[0].requires_grad_()
        p.grad = torch.randn_like(p)
        return _OPTIMIZERS[operation.name]([p], lr=1e-3, fused=True).step
    run = _BY_NAME.get(operation.name, _elementwise)
    if not operation.options.get("backward"):
        return lambda: run(operation, *inputs)
    wanted = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    if operation.options.get("no-dx"):
        inputs[0].requires_grad_(False)
        wanted = wanted[1:]
    out = run(operation, *inputs)
    gradient = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, wanted, gradient, retain_graph=True)


def tensors(operation: Operation, device: str) -> list[torch.Tensor]:
    """Its operands with seeded normal values; row numbers and targets stay inside the table."""
    maker = torch.Generator(device).manual_seed(0)

    def make(t: Tensor) -> torch.Tensor:
        if t.dtype == "int64":
            end = operation.shapes[0][0 if operation.name == "embedding" else -1]
            return torch.randint(end, t.shape, generator=maker, device=device)
        made = torch.randn(t.shape, generator=maker, device=device, dtype=DTYPES[t.dtype])
        return made.abs_().add_(0.1) if operation.name in ("log", "sqrt", "rsqrt", "div") else made

    return [make(t) for t in operation.operands]


# ------------------------------------------------------------------------------------------------------ measuring


def measure(operation: Operation, seconds: float = 1.0, *, shrink: int | None = None) -> Measured:
    """Run ``operation`` here for about ``seconds``, at least three times after a warm-up.

    Its sizes are halved until it should take less than 20 s and half of the free memory, or ``shrink`` times. Raises
    BadInput for a dtype that does not run here, NoAnswer where more than the device's peak would have been reached.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _runs_here(operation, device)
    if shrink is None:
        shrink = _fitting(operation, device)
    ran = shrunk(operation, shrink) if shrink else operation
    with _prepared(operation.dtype):
        before = _canary(device)
        inputs = tensors(ran, device)
        with torch.set_grad_enabled(bool(ran.options.get("backward"))):
            walls, cpus = _repeat(runner(ran, inputs), device, seconds)
        after = _canary(device)
    priced = price(ran)
    wall, cpu = statistics.median(walls), statistics.median(cpus)
    quarters = statistics.quantiles(walls, n=4)
    spread = quarters[2] - quarters[0]
    share, note = _mfu(ran, priced.flops, priced.kind, wall, device)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    notes = [*_shrunk_note(operation, ran, shrink), *_busy_notes(before, after, wall, spread, cpu, device)]
    if ran.options.get("window"):
        notes.append("the window is handed to torch as a mask: the kernel does the full square, its pairs are counted")
    return Measured(ran, name, priced.flops, priced.bytes, wall, spread, cpu, len(walls), torch.get_num_threads(),
                    _cpu_count(), shrink, (before, after), share, note, tuple(notes))  # fmt: skip


def compare(operations: Sequence[Operation], seconds: float = 1.0) -> tuple[Measured, ...]:
    """Each measured, all made smaller alike, so that their rates compare."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for operation in operations:
        _runs_here(operation, device)
    shrink = max((_fitting(op, device) for op in operations), default=0)
    return tuple(measure(op, seconds, shrink=shrink) for op in operations)


def _runs_here(operation: Operation, device: str) -> None:
    if operation.dtype not in DTYPES:
        raise BadInput(f"{operation.dtype} is priced and not run: its scaled product needs a recipe; measure bf16")
    if operation.dtype == "tf32" and device == "cpu":
        raise BadInput("a CPU has no TF32: measure fp32, or run on a GPU")
    if operation.dtype == "fp64" and operation.options.get("window"):
        raise BadInput("fp64 attention has no fused kernel; measure fp32")
    if operation.options.get("backward") and not operation.kernels:
        raise BadInput(f"the backward of {operation.name} is a view: there is nothing to measure")


def _repeat(run: Callable[[], Any], device: str, seconds: float) -> tuple[list[float], list[float]]:
    """Wall and CPU seconds of each repeat, after a warm-up."""
    clock = _cuda_clock if device == "cuda" else _cpu_clock
    once = max(clock(run, 1)[0], 1e-9)  # the first pays for loading and allocation
    if once < 1.0:
        once = max(clock(run, 1)[0], 1e-9)
    inner = max(1, math.ceil(_SAMPLE_SECONDS / once))
    walls: list[float] = []
    cpus: list[float] = []
    while len(walls) < _FEWEST or (sum(walls) * inner < seconds and len(walls) < _MOST):
        wall, cpu = clock(run, inner)
        walls.append(wall / inner)
        cpus.append(cpu / inner)
    return walls, cpus


def _cpu_clock(run: Callable[[], Any], times: int) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(times):
        run()
    return time.perf_counter() - wall, time.process_time() - cpu


def _cuda_clock(run: Callable[[], Any], times: int) -> tuple[float, float]:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    cpu = time.process_time()
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, time.process_time() - cpu


def _canary(device: str) -> float:
    """FLOP/s of a small fp32 product: the same before and after, if nothing else changed."""
    n = 512 if device == "cpu" else 2048
    a = torch.ones(n, n, device=device)
    with torch.no_grad():
        walls, _ = _repeat(lambda: a @ a, device, 0.05)
    return 2 * n**3 / statistics.median(walls)


def _fitting(operation: Operation, device: str) -> int:
    """The least power of two by which its sizes are divided so that it takes a bearable time and memory here."""
    rate, bandwidth = _calibration(operation.dtype, device)
    free = _free_bytes(device)
    for power in range(40):
        smaller = shrunk(operation, power) if power else operation
        priced = price(smaller)
        runs = 1 + _FEWEST + (1 if smaller.options.get("backward") else 0)
        takes = runs * ((priced.flops + priced.recompute_flops) / rate + priced.bytes / bandwidth)
        if takes <= _MOST_SECONDS and (free is None or smaller.footprint_bytes <= _MOST_MEMORY * free):
            return power
    raise BadInput(f"{operation.text} stays too large for this machine however its sizes are halved")


def _calibration(dtype: str, device: str) -> tuple[float, float]:
    """FLOP/s of a small product in ``dtype`` and bytes/s of a copy: enough to tell seconds from minutes."""
    n, copied = (512, 2**24) if device == "cpu" else (4096, 2**28)
    with _prepared(dtype), torch.no_grad():
        a = torch.ones(n, n, device=device, dtype=DTYPES[dtype])
        product, _ = _repeat(lambda: a @ a, device, 0.02)
        b = torch.ones(copied, device=device, dtype=torch.uint8)
        copy, _ = _repeat(lambda: b.clone(), device, 0.02)
    return 2 * n**3 / min(product), 2 * copied / min(copy)


def _free_bytes(device: str) -> int | None:
    """Free memory: the GPU's, or the machine's within this process's limit; None where nothing tells."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    found = []
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(x for x in lines if x.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # a container's; "max" where it has none
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(found, default=None)


@contextlib.contextmanager
def _prepared(dtype: str) -> Iterator[None]:
    """TF32 on or off as the dtype says, and denormals flushed: arithmetic on them is many times slower on some CPUs."""
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    old = [place.fp32_precision for place in places]
    flushed = not bool(torch.tensor(1e-40) * 1)
    try:
        for place in places:
            place.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
        torch.set_flush_denormal(True)
        yield
    finally:
        torch.set_flush_denormal(flushed)
        for place, precision in zip(places, old, strict=True):
            place.fp32_precision = precision


def _mfu(operation: Operation, flops: int, kind: str | None, seconds: float, device: str) -> tuple[float | None, str]:
    if device == "cpu":
        return None, "no peak is known for this CPU"
    if kind not in MODEL_KINDS:
        return None, f"MFU is for products: {operation.name} moves memory"
    try:
        card = by_driver_name(torch.cuda.get_device_name())
    except UnknownName as error:
        return None, str(error)
    if operation.dtype not in card.peak_flops_per_s:
        return None, f"no {operation.dtype} peak is known for {card.name}"
    return mfu(flops, seconds, card, operation.dtype), f"of the dense {operation.dtype} peak of {card.name}"


def _shrunk_note(asked: Operation, ran: Operation, power: int) -> list[str]:
    if not power:
        return []
    return [f"{asked.text} is too much for this machine: its sizes were divided by 2^{power}, so {ran.text} ran"]


def _busy_notes(before: float, after: float, wall: float, spread: float, cpu: float, device: str) -> list[str]:
    notes = []
    if abs(after / before - 1) > _BUSY:
        notes.append(f"the canary product ran at {after / before:.2f} of its speed before: the machine was not steady")
    if spread > _BUSY * wall:
        notes.append(f"half of the repeats spread over {spread / wall:.0%} of the median")
    if device == "cpu" and cpu < (1 - _BUSY) * wall:
        notes.append(f"only {cpu / wall:.2f} s of CPU per second: other work held the cores")
    return notes


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
