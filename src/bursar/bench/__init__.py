"""This machine measured, in under a minute: `calibrate`, and the ops benchmarked one by one since, `complete`."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from bursar import machine, store
from bursar.bench import clock, cuda, grids, overhead
from bursar.bench.single import Bench
from bursar.calibration import Calibration, Point
from bursar.context import signature
from bursar.ledger import Ledger
from bursar.pricing import Curves, Priced, local, wanted
from bursar.reconcile import Measured

__all__ = ["FULL", "QUICK", "Extent", "calibrate", "canaries", "complete", "here", "learn", "prepared", "priced"]

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured."""

    sizes: tuple[int, ...] = grids.SIZES
    few: tuple[int, ...] = grids.FEW
    layouts: tuple[str, ...] = grids.LAYOUTS
    rows: tuple[int, ...] = (16, 256, 4096)
    lengths: tuple[int, ...] = (64, 256, 1024)
    most_bytes: int = 2**27
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    reference: tuple[int, int, int, int] = (1024, 256, 8, 31)  # rows, width, layers, repeats


FULL = Extent()
QUICK = Extent((64, 256), (64,), ("NN", "NT"), (16,), (64,), 2**20, ("fp32",), (64, 32, 2, 3))


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """Denormals flushed (arithmetic on them is many times slower on some CPUs), the random state put back."""
    flushed = not bool(torch.tensor(1e-40) * 1)
    random = torch.get_rng_state()
    try:
        torch.set_flush_denormal(True)
        # A large block freed once makes the C library keep what is freed, as it does after a training step
        del_me = torch.empty(2**23 - 2**16)
        del del_me
        yield
    finally:
        torch.set_flush_denormal(flushed)
        torch.set_rng_state(random)


def canaries() -> dict[str, float]:
    """Seconds of a product and of a pass over memory that are always the same: medians of some."""
    a, b = torch.ones(384, 384), torch.ones(3 * 2**20)
    return {
        "matmul": clock.median(lambda: a @ a, budget=0.02, fewest=9)[0],
        "memory": clock.median(lambda: b.mul_(1.0), budget=0.02, fewest=9)[0],
    }


def here() -> machine.Machine:
    """The machine as it is now, with torch's threads and its GPU."""
    return machine.current(torch.get_num_threads(), torch.cuda.get_device_name() if torch.cuda.is_available() else "")


def calibrate(extent: Extent = FULL, say: Say = lambda text: None) -> Calibration:
    """This machine measured; ``say`` is told what is being measured. On a CUDA machine the GPU, else the CPU."""
    began, cpu = time.perf_counter(), time.process_time()
    me = here()
    device = me.device
    with prepared():
        before = canaries()
        bench = Bench(me.cache_bytes)
        spreads: list[float] = []
        matmul: dict[str, dict[str, tuple[Point, ...]]] = {}
        attention: dict[str, dict[str, tuple[Point, ...]]] = {}
        launch: dict[str, float] = {}
        if device:
            for dtype in cuda.DTYPES:
                say(f"products in {dtype}")
                matmul[dtype] = cuda.matmul(dtype)
            say("attention")
            attention = {dtype: cuda.attention(dtype) for dtype in ("fp32", "bf16")}
            bandwidth = cuda.bandwidth()
            launch = cuda.launch()
        else:
            for dtype in extent.dtypes:
                say(f"products in {dtype}")
                plain = dtype == "fp32"
                matmul[dtype] = grids.matmul(bench, dtype, extent.sizes if plain else extent.few, extent.layouts)
            for dtype in ("fp64", "fp16"):
                if extent is not QUICK:
                    matmul[dtype] = grids.matmul(bench, dtype, extent.few[:2], ("NN",))
            say("attention")
            attention = {dtype: grids.attention(dtype, extent.lengths) for dtype in extent.dtypes}
            say("bandwidth")
            bandwidth = grids.bandwidth(extent.most_bytes)
        say("ops by name")
        ops = {dtype: grids.ops(bench, dtype, extent.rows if dtype == "fp32" else extent.rows[-1:])
               for dtype in extent.dtypes}  # fmt: skip
        say("overhead of a call")
        around = overhead.measure(bench)
        half = Calibration("", me, clock.name(), 0.0, before, 1.0, 0.0, matmul, attention, {}, ops, bandwidth, around)
        say("a step whose ops are known")
        around = {**around, **overhead.cold(bench, half, *extent.reference)}
        half = dataclasses.replace(half, overhead=around)
        say("convolution")
        product = Curves(half)._product
        shares = grids.convolution(bench, lambda m, n, k: product("fp32", 1, "NN", m, n, k))
        after = canaries()
        spreads = bench.spreads
    took = time.perf_counter() - began
    drift = max((after[k] / before[k] for k in before), key=lambda r: abs(r - 1))
    return Calibration(
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        me,
        clock.name(),
        took,
        {k: (before[k] + after[k]) / 2 for k in before},
        drift,
        statistics.median(spreads) if spreads else 0.0,
        matmul,
        attention,
        shares,
        ops,
        bandwidth,
        around,
        launch,
        (time.process_time() - cpu) / took,
    )


def priced(ledger: Ledger, *, benchmark: bool = True, say: Say = lambda text: None) -> Priced:
    """``ledger``'s step on this machine, with ``benchmark`` after the ops nobody has met yet were run by themselves.

    Raises NotCalibrated where this machine was not measured as it is now.
    """
    me = here()
    known = complete(ledger, store.load(me), say=say) if benchmark and ledger.calls else {}
    return local(ledger, me, known)


def learn(model: str, forecast: Priced, measured: Measured) -> None:
    """Keep what was forecast and measured, for the next forecast's interval. A busy machine teaches nothing."""
    if not measured.busy:
        took = measured.by(forecast.expected.clock)
        store.record(store.load(here()), model, forecast.forecast.seconds, took, forecast.benchmarked > 0)


def complete(
    ledger: Ledger, calibration: Calibration, *, budget_seconds: float = 60.0, say: Say = lambda text: None
) -> dict[str, float]:
    """Seconds by signature of ``ledger``'s ops, those that nobody has benchmarked run here, one op at a time, and kept.

    The longest by the curves come first; past ``budget_seconds`` the rest stay with the curves.
    """
    known = store.remembered(calibration)
    todo = wanted(ledger, calibration, known)
    if not todo:
        return known
    new: dict[str, float] = {}
    began = time.perf_counter()
    with prepared():
        bench = Bench(calibration.machine.cache_bytes)
        for i, place in enumerate(todo):
            if time.perf_counter() - began > budget_seconds:
                break
            if i % 25 == 0:
                say(f"benchmarking op {i + 1} of {len(todo)}: {place.call.op}")
            seconds = bench.seconds(place.call, place.state)
            if seconds is not None:
                new[signature(place.call, place.state)] = seconds
    store.remember(calibration, new)
    return {**known, **new}
