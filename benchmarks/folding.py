"""What depth costs: CPU seconds to trace a deep model against a shallow one of the same blocks, rounds alternating.

    python benchmarks/folding.py [--rounds 5] [--write]

The step is traced and its figures asked for (FLOPs, peak). `whole` is the same step with every block traced. As timeit
does, the garbage collector is off while the clock runs: a full collection of torch's objects takes 0.2 s and falls
into every third trace or so, deep or shallow.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

import bursar

PAIRS = (("llama3-405b:L=4", "llama3-405b", 1.5), ("gpt2:L=12", "gpt2:L=120", 1.2), ("mlp:L=50", "mlp:L=500", 1.2))


def seconds(model: str, fold: bool = True) -> float:
    """CPU time of one traced step and its figures."""
    gc.collect()
    gc.disable()
    began = time.process_time()
    ledger = bursar.step(model, precision="bf16", on="h100-sxm", fold=fold)
    assert ledger.flops.model
    assert ledger.memory.peak_bytes
    took = time.process_time() - began
    gc.enable()
    return took


def main() -> None:
    """Print the table; with --write, keep it beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    where = f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    lines = [
        "# Folding",
        "",
        f"One step traced, bf16, CPU seconds: median of {arguments.rounds} alternating rounds, and the ratio's range.",
        f"{where}, torch {torch.__version__}.",
        "",
        "| shallow | deep | shallow s | deep s | deep / shallow | range | goal | deep, traced whole s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shallow, deep, goal in PAIRS:
        seconds(shallow)
        pairs = [(seconds(shallow), seconds(deep)) for _ in range(arguments.rounds)]
        ratios = [d / s for s, d in pairs]
        a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
        lines.append(
            f"| {shallow} | {deep} | {a:.2f} | {b:.2f} | {statistics.median(ratios):.2f} "
            f"| {min(ratios):.2f}–{max(ratios):.2f} | ≤ {goal} | {seconds(deep, fold=False):.1f} |"
        )
    table = "\n".join(lines) + "\n"
    sys.stdout.write(table)
    if arguments.write:
        Path(__file__).with_suffix(".md").write_text(table)


if __name__ == "__main__":
    main()
