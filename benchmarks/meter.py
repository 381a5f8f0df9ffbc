"""What `bursar.Meter` costs a step: microseconds of CPU per step(), readings and memory look-ups included.

    python benchmarks/meter.py [--write]

The loop around it does nothing, so that the figure is the meter's alone; the last column is its share of a step of
50 ms. Paired runs of a real loop with and without it told nothing: the difference drowns in the machine's noise.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from bursar.meter.costs import Costs
from bursar.meter.live import Meter

STEPS, ROUNDS = 5000, 7


def microseconds(every: int, costs: Costs | None) -> list[float]:
    """Of CPU time per step, for each round."""
    found = []
    for _ in range(ROUNDS):
        with Meter(costs, device="h100-sxm" if costs else None, log=lambda *a: None, every=every) as meter:
            batches = meter.batches(iter(range(STEPS)))
            began = time.process_time()
            for _ in batches:
                meter.step()
            found.append((time.process_time() - began) / STEPS * 1e6)
    return found


def main() -> None:
    """Print the table; with --write, keep it beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    costs = Costs("net", 1, 1, 1, {"bf16": 1}, {"bf16": 1}, 1)
    where = f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    lines = [
        "# The meter",
        "",
        f"CPU time of one `step()`, median of {ROUNDS} rounds of {STEPS} and range.",
        f"{where}, torch {torch.__version__}.",
        "",
        "| a reading every | µs per step | range | of a 50 ms step |",
        "|---|---|---|---|",
    ]
    for every in (1, 10, 100):
        found = microseconds(every, costs)
        median = statistics.median(found)
        lines.append(f"| {every} | {median:.1f} | {min(found):.1f}–{max(found):.1f} | {median / 50e3:.4%} |")
    table = "\n".join(lines) + "\n"
    sys.stdout.write(table)
    if arguments.write:
        Path(__file__).with_suffix(".md").write_text(table)


if __name__ == "__main__":
    main()
