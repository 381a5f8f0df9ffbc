"""What a plan costs: seconds of the two questions, start-up included, and layouts priced per second.

    python benchmarks/search.py [--rounds 5] [--write]

A layout is priced when it has its memory, and its seconds too where it fits. The goals are the issue's: GPT-3 on 512
GPUs exhaustively in less than 10 s, Llama 3 70B on 1024 in less than 5 s. Both wall and CPU seconds of the whole
process are shown; the wall's are those of a machine that others use.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

QUESTIONS = {
    "GPT-3 on 512 A100, below 10 s": (
        "plan", "gpt3-175b", "--on", "512xa100-80g-sxm", "--tokens", "300B", "--batch-tokens", "3.2M",
        "--seq-len", "2048",
    ),
    "Llama 3 70B on 1024 H100, below 5 s": (
        "plan", "llama3-70b", "--on", "1024xh100-sxm", "--tokens", "15T", "--batch-tokens", "16M", "--seq-len", "8192",
    ),
    "Mixtral 8x7B on 256 H100, with ep": (
        "plan", "mixtral-8x7b", "--on", "256xh100-sxm", "--tokens", "1T", "--batch-tokens", "4M", "--seq-len", "4096",
    ),
}  # fmt: skip
STRUCTURE = ("tp does not", "cp does not", "more stages", "ep does not", "sequence parallelism", "one replica",
             "virtual stages", "the batch", "every k")  # fmt: skip
PEERS = "peers, as the issue quotes them: 8 to 18 feasible layouts a second; GPT-3 on 512 takes more than 560 s"


def asked(argv: tuple[str, ...]) -> tuple[float, float, dict[str, object]]:
    """Wall and CPU seconds of the process, and its answer."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    made = subprocess.run([sys.executable, "-m", "bursar", *argv, "--json"], check=True, capture_output=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, json.loads(made.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/search.md")
    args = parser.parse_args()
    lines = [
        f"Median of {args.rounds} rounds, start-up included; {datetime.date.today()}, {platform.machine()}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, one thread.",
        "",
        "| question | wall s | CPU s | combinations | priced | feasible | priced per CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, argv in QUESTIONS.items():
        rounds = [asked(argv) for _ in range(args.rounds)]
        wall, cpu = (statistics.median(r[i] for r in rounds) for i in (0, 1))
        answer = rounds[0][2]
        unpriced = sum(n for why, n in answer["rejected"].items() if why.startswith(STRUCTURE))  # type: ignore[attr-defined]
        priced = answer["searched"] - unpriced  # type: ignore[operator]
        lines.append(
            f"| {name} | {wall:.1f} | {cpu:.1f} | {answer['searched']:,} | {priced:,} | {answer['feasible']:,} "
            f"| {priced / cpu:,.0f} |"
        )
    lines += ["", f"Every layout that divides is priced: nothing is pruned, so the regret is 0. P{PEERS[1:]}."]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.write:
        Path(__file__).with_suffix(".md").write_text("# Searching layouts\n\n" + text, encoding="utf-8")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
