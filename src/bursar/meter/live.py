"""A meter in a live training loop: seconds, tokens/s, MFU and memory, beside what was forecast.

It asks nothing of the device that would hold it up: on CUDA a step ends at an event that is recorded there and read
once it has passed. It runs no collective: each rank meters itself, and rank 0 reports.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from bursar import roofline
from bursar.errors import BadInput, BursarError, UnknownName
from bursar.hardware import Accelerator, by_driver_name, cluster
from bursar.ledger import Ledger
from bursar.meter.costs import Costs, of_model
from bursar.trace.session import _tf32_flags
from bursar.units import format_bytes, format_seconds

T = TypeVar("T")
Log = Callable[[Mapping[str, float], int], Any]


@dataclass(frozen=True, slots=True)
class Reading:
    """The steps since the last reading. What cannot be said is None, and ``why`` says why."""

    step: int  # optimizer steps since the meter started
    steps: int  # of them, in this reading
    step_seconds: float
    tokens_per_s: float | None  # of the whole job
    data_wait_share: float | None  # of the time: waiting for `Meter.batches`, where the loop takes them from it
    mfu: float | None
    hfu: float | None
    memory_bytes: int  # on CUDA allocated, else of the process
    memory_peak_bytes: int
    forecast_seconds: float | None
    forecast_peak_bytes: int | None
    why: str = ""

    def numbers(self) -> dict[str, float]:
        """What a logger takes: ``bursar/mfu`` and its like, those that are known."""
        known = ((name, getattr(self, name)) for name in self.__slots__ if name not in ("step", "steps", "why"))
        return {f"bursar/{name}": float(value) for name, value in known if value is not None}

    def line(self) -> str:
        """One line for the terminal."""
        parts = [f"step {self.step}", f"{format_seconds(self.step_seconds)}/step"]
        if self.forecast_seconds is not None:
            parts[-1] += f" (forecast {format_seconds(self.forecast_seconds)})"
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:,.0f} tokens/s")
        if self.mfu is not None and self.hfu is not None:
            parts.append(f"MFU {self.mfu:.1%}, HFU {self.hfu:.1%}")
        memory = f"memory {format_bytes(self.memory_bytes)}, peak {format_bytes(self.memory_peak_bytes)}"
        if self.forecast_peak_bytes is not None:
            memory += f" (forecast {format_bytes(self.forecast_peak_bytes)})"
        parts.append(memory)
        if self.data_wait_share is not None and self.data_wait_share >= 0.005:
            parts.append(f"{self.data_wait_share:.0%} waiting for data")
        return " · ".join(parts)


class Meter:
    """Meter a training loop.

        with bursar.Meter(bursar.step(model, batch, precision="bf16-mixed")) as meter:
            for batch in meter.batches(loader):      # the wait for data is metered
                ...
                optimizer.step()
                meter.step()                         # once per optimizer step

    ``costs`` are a ledger's, `Costs`, or None: then there is no MFU. ``device`` is a catalogue name; without it CUDA's
    own name is looked up. ``log(numbers, step)`` is called on rank 0 with every reading: `accelerator.log`, `wandb.log`
    or a TensorBoard ``SummaryWriter``; without it a line goes to stderr. A reading covers ``every`` steps. The first
    step is warm-up and not counted.

    MFU is left out, with the reason in `Reading.why`, where the device's peak is not known or is not the one the FLOPs
    were counted for; over 100 % it is impossible, and ``why`` names the likely cause. A meter never ends a run.
    """

    def __init__(
        self,
        costs: Ledger | Costs | None = None,
        *,
        device: str | None = None,
        log: Log | Any = None,
        every: int = 10,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if every < 1:
            raise BadInput(f"a reading of {every} steps says nothing; give every=1 or more")
        self.costs = Costs.of(costs) if isinstance(costs, Ledger) else costs
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.readings: list[Reading] = []
        self.dropped = 0  # intervals that were zero or negative
        self._log = _logger(log)
        self._every, self._clock = every, clock
        self._cuda = torch.cuda.is_available()
        self._ideal, self._refused = self._at_peak(device)
        self._forecast_seconds: float | None = None
        if isinstance(costs, Ledger) and device is not None and not self._refused:
            self._forecast_seconds = roofline.forecast(costs, cluster(device)).seconds
        self._last: Any = None
        self._pending: deque[tuple[Any, float]] = deque()
        self._waited, self._hands_out = 0.0, False
        self._steps = 0
        self._window: list[tuple[float, float]] = []  # (seconds, of them waiting) of each step
        self._all = [0, 0.0, 0.0]  # steps, seconds, waiting

    @classmethod
    def of(cls, model: torch.nn.Module, batch: Any, *, meter: Mapping[str, Any] | None = None, **step: Any) -> Meter:
        """A meter for ``model``, traced as `bursar.step` would with ``step``'s options, or remembered from before.

        ``meter`` are the options of the meter itself.
        """
        return cls(of_model(model, batch, **step), **(meter or {}))

    def _at_peak(self, device: str | None) -> tuple[dict[str, float], str]:
        """Seconds of model and hardware FLOPs at dense peak, or the reason there is no such figure."""
        if self.costs is None:
            return {}, "no MFU: the meter was given no ledger; pass bursar.step(model, batch)"
        try:
            if device is not None:
                row: Accelerator = cluster(device).accelerator
            elif self._cuda:
                names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
                if len(names) > 1:
                    return {}, f"no MFU: this machine's devices differ ({', '.join(sorted(names))}); name one: device="
                row = by_driver_name(names.pop())
            else:
                return {}, "no MFU: this machine's CPU has no known peak; name the device: device='h100-sxm'"
            if self._cuda and "matmul" in _tf32_flags() and "fp32" in self.costs.model_flops:
                return {}, "no MFU: products counted in fp32 run on TF32 here; count them so: precision='tf32'"
            return {
                "mfu": roofline.seconds_at_peak(self.costs.model_flops, row),
                "hfu": roofline.seconds_at_peak(self.costs.hardware_flops, row),
            }, ""
        except UnknownName as error:
            if device is not None:
                raise
            return {}, f"no MFU: {error}"
        except BursarError as error:
            return {}, f"no MFU: {error}"

    # ---- in the loop

    def __enter__(self) -> Meter:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *error: object) -> None:
        """Read what is left and, where no logger was given, print the summary; also after an error or Ctrl-C."""
        if self._cuda and self._pending:
            with contextlib.suppress(RuntimeError):  # a device in error has no more times to give
                self._pending[-1][0].synchronize()
                self._collect()
        if self._window:
            self._read()
        if self._log is _print and self.rank == 0:
            print(self.summary(), file=sys.stderr)

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """What ``loader`` gives, the wait for it metered."""
        self._hands_out = True
        batches = iter(loader)
        while True:
            began = self._clock()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waited += max(0.0, self._clock() - began)
            yield batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What runs in here, an evaluation or a checkpoint, belongs to no step: the step it falls in is not counted."""
        try:
            yield
        finally:
            self._last, self._waited = None, 0.0
            self._pending.clear()

    def step(self) -> None:
        """An optimizer step has been taken (on CUDA: sent off)."""
        self._steps += 1
        waited, self._waited = self._waited, 0.0
        if not self._cuda:
            now = self._clock()
            if self._last is not None:
                self._took(now - self._last, waited)
            self._last = now
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._pending.append((event, waited))
        self._collect()

    def _collect(self) -> None:
        """Read the events that have passed."""
        while self._pending and self._pending[0][0].query():
            event, waited = self._pending.popleft()
            if self._last is not None:
                self._took(self._last.elapsed_time(event) / 1e3, waited)
            self._last = event

    def _took(self, seconds: float, waited: float) -> None:
        if not seconds > 0:
            self.dropped += 1
            return
        self._window.append((seconds, min(waited, seconds)))
        if len(self._window) == self._every:
            self._read()

    # ---- readings

    def _read(self) -> None:
        steps, seconds, waited = len(self._window), sum(s for s, _ in self._window), sum(w for _, w in self._window)
        self._window.clear()
        for i, n in enumerate((steps, seconds, waited)):
            self._all[i] += n
        reading = self._reading(steps, seconds, waited)
        self.readings.append(reading)
        if len(self.readings) > 1000:  # a long run's meter must not grow
            del self.readings[:500]
        if self.rank == 0:
            self._log(reading.numbers(), reading.step) if self._log is not _print else _print(reading)

    def _reading(self, steps: int, seconds: float, waited: float) -> Reading:
        per_step, costs = seconds / steps, self.costs
        mfu, hfu = (self._ideal[k] / per_step if k in self._ideal else None for k in ("mfu", "hfu"))
        why = self._refused
        if mfu is not None and hfu is not None and max(mfu, hfu) > 1:
            why = self._impossible(max(mfu, hfu))
            mfu = hfu = None
        now, peak = self._memory()
        return Reading(
            self._steps - len(self._pending),
            steps,
            per_step,
            costs.tokens * self.ranks / per_step if costs is not None else None,
            waited / seconds if self._hands_out else None,
            mfu,
            hfu,
            now,
            peak,
            self._forecast_seconds,
            costs.peak_bytes if costs is not None else None,
            why,
        )

    def _impossible(self, share: float) -> str:
        """The likely cause of an MFU over 100 %."""
        costs = self.costs
        assert costs is not None
        if costs.micro_batches > 1 and share / costs.micro_batches <= 1:
            cause = f"step() is called for each of {costs.micro_batches} micro-batches; call it once per optimizer step"
        elif "fp32" in costs.model_flops:
            cause = "the run computes in bf16 or TF32 where the ledger counts fp32; trace it with the run's precision"
        else:
            cause = f"a batch runs that is smaller than the {costs.tokens} tokens traced, or another device than named"
        return f"an MFU of {share:.0%} is impossible; likely {cause}"

    def _memory(self) -> tuple[int, int]:
        if self._cuda:
            return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        try:
            with open("/proc/self/statm", encoding="ascii") as f:
                now = int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            now = peak
        return now, max(now, peak)

    def total(self) -> Reading | None:
        """All steps counted so far as one reading; None before the second step."""
        steps, seconds, waited = self._all
        return self._reading(int(steps), seconds, waited) if steps else None

    def summary(self) -> str:
        """The whole run in a line or two."""
        total = self.total()
        if total is None:
            return "bursar: no step was metered (the first is warm-up)"
        lines = [f"bursar: {total.steps} steps metered: {total.line()}"]
        if total.why:
            lines.append(f"  {total.why}")
        if self.dropped:
            lines.append(f"  {self.dropped} intervals of no or negative length were left out: the clock was set back")
        if self.costs is not None and self.costs.uncounted:
            lines.append(f"  at least: {', '.join(self.costs.uncounted)} have no rule and are not counted")
        return "\n".join(lines)


def _print(reading: Reading) -> None:
    print(reading.line(), file=sys.stderr)


def _logger(log: Any) -> Any:
    """``log`` as a function of numbers and step; a SummaryWriter is called scalar by scalar."""
    if log is None:
        return _print
    add_scalar = getattr(log, "add_scalar", None)
    if add_scalar is not None:
        return lambda numbers, step: [add_scalar(name, value, step) for name, value in numbers.items()]
    if not callable(log):
        raise BadInput(f"{type(log).__name__} cannot log; give a function log(numbers, step) or a SummaryWriter")
    return log
