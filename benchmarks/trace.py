"""Tracing against torch's own counter: seconds of CPU for one step, and the memory of the process.

    python benchmarks/trace.py [--rounds 3] [--write]

Each row is a process of its own: it builds the model, runs one step to warm up and times the next ones. The same model,
the same step (forward, backward, AdamW), on
  bursar       the fake accelerator, everything recorded: ops, costs, storages, modules
  counter gpu  torch's FlopCounterMode over the same fake accelerator (same ops, foreach AdamW)
  counter cpu  torch's FlopCounterMode over fake CPU tensors, as it is commonly used
  counter meta torch's FlopCounterMode over meta tensors: no fake tensors at all; folding is to beat this one
Rounds alternate between the rows, so that a slow minute of the machine hits all alike; the median is shown.
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

ROWS = ("bursar", "counter gpu", "counter cpu", "counter meta")
MODELS = ("llama3-8b", "llama3-70b")
SEQ_LEN = 8192


def one(row: str, name: str) -> dict[str, float]:
    """Warm up and time one step in this process."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    from bursar.trace import Session
    from bursar.workload.presets import build

    preset = build(name)
    device = {"bursar": "cuda", "counter gpu": "cuda", "counter cpu": "cpu", "counter meta": "meta"}[row]

    def setup() -> object:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(device):
            model = preset.make_model()
            batch = preset.make_batch(1, SEQ_LEN)
        torch.set_default_dtype(torch.float32)
        optimizer = torch.optim.AdamW(model.parameters())

        def step() -> None:
            loss = preset.loss(model, batch)
            loss.backward()
            del loss
            optimizer.step()
            optimizer.zero_grad()

        return step

    def timed(step: object) -> float:
        before = time.process_time()
        step()
        return time.process_time() - before

    flops = 0
    if row == "bursar":
        session = Session(None)
        with session.open():
            step = setup()
            step()
            session.mark()
            seconds = timed(step)
        flops = session.ledger.flops.model
    elif row == "counter gpu":
        session = Session(None)
        with session.open():
            session.recorder.muted += 1
            step = setup()
            step()
            counter = FlopCounterMode(display=False)
            with counter:
                seconds = timed(step)
        flops = counter.get_total_flops()
    else:
        with FakeTensorMode() if row == "counter cpu" else torch.device("meta"):
            step = setup()
            step()
            counter = FlopCounterMode(display=False)
            with counter:
                seconds = timed(step)
        flops = counter.get_total_flops()
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "rss_mib": rss, "flops": flops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/trace.md")
    parser.add_argument("--one", nargs=2, metavar=("ROW", "MODEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(*args.one)))
        sys.stdout.flush()
        os._exit(0)
    import torch

    lines = [
        f"One step traced: CPU seconds (median of {args.rounds} alternating rounds, and range), peak RSS.",
        f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, torch {torch.__version__}; batch 1, sequence {SEQ_LEN}, bf16, AdamW.",
        "",
        "| model | row | CPU s | range | RSS MiB | model FLOPs it counts |",
        "|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        found: dict[str, list[dict[str, float]]] = {row: [] for row in ROWS}
        for _ in range(args.rounds):
            for row in ROWS:
                run = subprocess.run(
                    [sys.executable, __file__, "--one", row, name], capture_output=True, text=True, check=False
                )
                if run.returncode:
                    print(f"{row} {name}: {run.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                    continue
                found[row].append(json.loads(run.stdout.splitlines()[-1]))
        for row, runs in found.items():
            if not runs:
                lines.append(f"| {name} | {row} | failed | | | |")
                continue
            seconds = [r["seconds"] for r in runs]
            lines.append(
                f"| {name} | {row} | {statistics.median(seconds):.2f} | {min(seconds):.2f}–{max(seconds):.2f} "
                f"| {max(r['rss_mib'] for r in runs):.0f} | {runs[0]['flops']:.4g} |"
            )
    text = "\n".join(lines) + "\n"
    print(text)
    if args.write:
        Path(__file__).with_suffix(".md").write_text("# Tracing\n\n" + text, encoding="utf-8")


if __name__ == "__main__":
    main()
