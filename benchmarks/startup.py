"""What an answer without torch costs: CPU seconds of the whole process, against Python starting and doing nothing.

    python benchmarks/startup.py [--rounds 9] [--write]

The goal is 0.3 s of CPU for each. Rounds alternate between the rows; the median and the range are shown.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROWS = {
    "python -c pass": ["-c", "pass"],
    "import bursar": ["-c", "import bursar"],
    "bursar --help": ["-m", "bursar", "--help"],
    "bursar run": ["-m", "bursar", "run", "--params", "70B", "--tokens", "15T", "--on", "1024xh100-sxm"],
    "bursar hardware": ["-m", "bursar", "hardware"],
    "bursar op": ["-m", "bursar", "op", "matmul 16384x32768x8192", "--on", "h100-sxm"],
    "import torch": ["-c", "import torch"],
}


def cpu_seconds(argv: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *argv], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/startup.md")
    args = parser.parse_args()
    for argv in ROWS.values():  # compile the bytecode, fill the file cache
        cpu_seconds(argv)
    found: dict[str, list[float]] = {row: [] for row in ROWS}
    for _ in range(args.rounds):
        for row, argv in ROWS.items():
            found[row].append(cpu_seconds(argv))
    lines = [
        f"CPU seconds of the process, median of {args.rounds} alternating rounds and range; the goal is 0.3.",
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}.",
        "",
        "| answer | CPU s | range |",
        "|---|---|---|",
    ]
    lines += [f"| {row} | {statistics.median(t):.3f} | {min(t):.3f}–{max(t):.3f} |" for row, t in found.items()]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.write:
        Path(__file__).with_suffix(".md").write_text("# Starting up\n\n" + text, encoding="utf-8")


if __name__ == "__main__":
    main()
