"""`measured.measure` for a user's own step, which may raise, run out of memory, or lose its loss on the way.

Whatever happens, the process lives, nothing of the measurement stays in torch, and the figures measured until then go
with the error. The loss is read from memory, not by an op: the record of the step is the step's alone.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bursar.errors import BursarError, StepFailed
from bursar.ledger import Ledger
from bursar.reconcile import Measured
from bursar.trace.failures import user_line
from bursar.unfinished import Unfinished, remedy
from bursar.workload.resolve import Workload

_noted: contextvars.ContextVar[dict[str, int] | None] = contextvars.ContextVar("noted", default=None)


def note(**figures: int) -> None:
    """Keep what a part of the measurement has found, should a later part fail."""
    found = _noted.get()
    if found is not None:
        found.update(figures)


class LossLost(ArithmeticError):
    """The loss of a step is no number."""


class Watch:
    """A workload's loss, looked at each time. ``calls`` counts the micro-batches begun."""

    def __init__(self, loss: Callable[[Any, Any], Tensor]) -> None:
        self.loss, self.calls = loss, 0

    def __call__(self, module: Any, batch: Any) -> Tensor:
        """The loss. Raises LossLost where it is NaN or infinite."""
        self.calls += 1
        loss = self.loss(module, batch)
        found = value(loss)
        if found is not None and not math.isfinite(found):
            raise LossLost(f"the loss is {found}")
        return loss


def value(loss: Tensor) -> float | None:
    """A scalar on the host, read where it lies; None for others, which only an op could read (and wait for)."""
    if loss.device.type != "cpu" or loss.numel() != 1 or type(loss) is not Tensor:
        return None
    if loss.dtype is torch.bfloat16:  # the upper half of an fp32
        bits = ctypes.c_uint32(ctypes.c_uint16.from_address(loss.data_ptr()).value << 16)
        return ctypes.c_float.from_buffer(bits).value
    kind = {torch.float32: ctypes.c_float, torch.float64: ctypes.c_double}.get(loss.dtype)
    return None if kind is None else float(kind.from_address(loss.data_ptr()).value)


def measure(work: Workload, ledger: Ledger, device: torch.device, **options: Any) -> Measured:
    """As `measured.measure`. Raises StepFailed, with what was measured, for whatever the step itself raises."""
    from bursar.meter import measured

    watch = Watch(work.loss)
    figures: dict[str, int] = {}
    token = _noted.set(figures)
    free = math.inf
    try:
        with limited(device) as free:
            return measured.measure(dataclasses.replace(work, loss=watch), ledger, device, **options)
    except BursarError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        kind, reason = _kind(error)
        steps = max(0, watch.calls - 1) // max(1, int(options.get("accumulate", 1)))
        failed = Unfinished(kind, reason, user_line(error), steps, device.type, dict(figures))
        where = f" at {failed.where}" if failed.where and kind == "raised" else ""
        told = f"step {steps + 1} of the measurement {reason}{where}; "
        raise StepFailed(
            told + remedy(ledger, failed, int(free) if math.isfinite(free) else 0), failed, ledger
        ) from error
    finally:
        _noted.reset(token)


def _kind(error: BaseException) -> tuple[str, str]:
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if isinstance(error, KeyboardInterrupt):
        return "stopped", "was stopped"
    if isinstance(error, LossLost):
        return "loss", f"gave no number: {text}"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return "memory", "ran out of memory"
    return "raised", f"raised {type(error).__name__}: {text}" if text else f"raised {type(error).__name__}"


# ---- memory: a step that takes more than there is gets an error, not the system's axe


@contextlib.contextmanager
def limited(device: torch.device) -> Iterator[float]:
    """Within this block this process may take the memory that is free now and no more. Yields the bytes.

    Linux gives memory it does not have and kills whoever uses it; under this limit (RLIMIT_DATA, the soft one) the
    allocation fails and is an error. On a GPU, and where there is no such limit, nothing is done.
    """
    free = available()
    try:
        import resource
    except ImportError:
        free = math.inf
    if device.type != "cpu" or not math.isfinite(free):
        yield math.inf
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = _status("VmData") + int(free)
    if soft != resource.RLIM_INFINITY:
        most = min(most, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    try:
        yield free
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def available() -> float:
    """Bytes that can be taken without another's being taken away: the machine's, or this container's; else infinite."""
    try:
        text = Path("/proc/meminfo").read_text()
        free = float(next(line for line in text.splitlines() if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return math.inf
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        group = Path("/sys/fs/cgroup")
        free = min(free, float((group / "memory.max").read_text()) - float((group / "memory.current").read_text()))
    return max(free, 0.0)


def _status(name: str) -> int:
    """A figure of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0
