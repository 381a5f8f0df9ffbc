"""Clocks: wall time, a thread's CPU time, and which of them tells the truth about an op.

With one thread the thread's CPU time does not see what other processes take; with several only wall time counts. A
call shorter than a scheduler's slice is seldom interrupted, and the median throws those away: there wall time, which
costs 30 ns to read, is better than CPU time, which costs a system call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

SHORT_SECONDS = 2e-4  # below this the wall clock is used whatever the threads


def name() -> str:
    """``cpu`` where one thread does the work, else ``wall``."""
    return "cpu" if torch.get_num_threads() == 1 else "wall"


def long_clock() -> Callable[[], float]:
    """The clock for what takes long."""
    return time.thread_time if name() == "cpu" else time.perf_counter


def null(clock: Callable[[], float]) -> float:
    """What two readings of ``clock`` cost."""
    found = []
    for _ in range(101):
        began = clock()
        found.append(clock() - began)
    return statistics.median(found)


def median(
    run: Callable[[], Any],
    *,
    before: Callable[[], Any] | None = None,
    budget: float = 6e-3,
    fewest: int = 5,
    most: int = 60,
    warm: int = 1,
) -> tuple[float, float]:
    """Seconds of ``run``, the median of repeats, and half of their spread between the quartiles as a share of it.

    ``before`` runs ahead of each repeat, outside the clock. Repeats go on for ``budget`` seconds of ``run``.
    """
    guess = 0.0
    for _ in range(warm):
        if before is not None:
            before()
        began = time.perf_counter()
        run()
        guess = time.perf_counter() - began
    clock = time.perf_counter if guess < SHORT_SECONDS else long_clock()
    cost = null(clock)
    found: list[float] = []
    while len(found) < fewest or (sum(found) < budget and len(found) < most):
        if before is not None:
            before()
        began = clock()
        run()
        found.append(max(clock() - began - cost, 1e-9))
        if len(found) >= 3 and sum(found) > 20 * budget:
            break
    middle = statistics.median(found)
    quarters = statistics.quantiles(found, n=4) if len(found) > 2 else [middle] * 3
    return middle, (quarters[2] - quarters[0]) / 2 / middle
