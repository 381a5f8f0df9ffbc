"""How fast the caching allocator is replayed: events per second of CPU time, on timelines of traced steps.

    python benchmarks/allocator.py        writes benchmarks/allocator.md

A step's timeline is repeated, with storages of its own each time, until there are a million events; what stands between
steps is allocated once. Random traces beside them have nothing that recurs.
"""

from __future__ import annotations

import datetime
import platform
import random
import time
from pathlib import Path

import numpy as np
import torch

import bursar
from bursar.allocator import Held, replay

EVENTS = 1_000_000
STEPS = {
    "GPT-2 124M, AdamW foreach, 8x1024": ("gpt2", {"batch_size": 8, "seq_len": 1024}),
    "Llama-3 8B, bf16, recomputed, 1x4096": (
        "llama3-8b", {"batch_size": 1, "seq_len": 4096, "precision": "bf16", "recompute": "full"}),
    "ResNet-50, momentum, 32x224": ("resnet50", {"batch_size": 32, "optimizer": "momentum"}),
}  # fmt: skip


def repeated(memory: bursar.memory.Memory) -> tuple[np.ndarray, np.ndarray]:
    """Storages and deltas of a timeline, again and again."""
    base = np.array(memory.base_storages, np.int64).reshape(-1, 2)
    ids, deltas = memory.event_storages, memory.event_deltas
    stays, n = np.isin(ids, base[:, 0]), int(ids.max()) + 1
    times = -(-EVENTS // len(ids))
    all_ids = [base[:, 0], *(np.where(stays, ids, ids + (k + 1) * n) for k in range(times))]
    return np.concatenate(all_ids), np.concatenate([base[:, 1], *[deltas] * times])


def at_random() -> tuple[np.ndarray, np.ndarray]:
    """Allocations and frees in a random order, up to 400 alive, sizes log-uniform from 512 B to 64 MiB."""
    draw = random.Random(0)
    live: list[tuple[int, int]] = []
    events: list[tuple[int, int]] = []
    for storage in range(EVENTS // 2):
        if len(live) >= 400 or (live and draw.random() < 0.5):
            i = draw.randrange(len(live))
            live[i], live[-1] = live[-1], live[i]
            gone, size = live.pop()
            events.append((gone, -size))
        size = int(2 ** draw.uniform(9, 26))
        live.append((storage, size))
        events.append((storage, size))
    table = np.array(events)
    return table[:, 0], table[:, 1]


def timed(ids: np.ndarray, deltas: np.ndarray, expandable: bool) -> tuple[float, Held]:
    """Events per CPU second, the best of three; and what was held."""
    best = float("inf")
    for _ in range(3):
        began = time.process_time()
        found = replay(ids, deltas, expandable_segments=expandable)
        best = min(best, time.process_time() - began)
    return len(ids) / best, found


def bare() -> float:
    """Turns per CPU second of an empty loop over two lists: how fast this machine ran Python meanwhile."""
    numbers = list(range(EVENTS))
    best = float("inf")
    for _ in range(3):
        began = time.process_time()
        for _a, _b in zip(numbers, numbers, strict=True):
            pass
        best = min(best, time.process_time() - began)
    return EVENTS / best


def main() -> None:
    """Write the table."""
    torch.set_num_threads(1)
    before = bare()
    timelines = {name: repeated(bursar.step(model, **how).memory) for name, (model, how) in STEPS.items()}
    timelines["random, 400 alive, no size twice"] = at_random()
    rows = []
    for name, (ids, deltas) in timelines.items():
        for expandable in (False, True):
            rate, found = timed(ids, deltas, expandable)
            over = found.reserved_bytes / found.allocated_bytes - 1
            rows.append(
                f"| {name} | {'yes' if expandable else 'no'} | {len(ids):,} | {rate / 1e6:.2f} M | "
                f"{found.allocated_bytes / 2**20:,.0f} | {found.reserved_bytes / 2**20:,.0f} | {over:.1%} |"
            )
            print(rows[-1], flush=True)
    text = f"""# The allocator's replay

Written by `python benchmarks/allocator.py`, {datetime.date.today()}: {platform.machine()},
Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}, bursar {bursar.__version__}.
One core; CPU time, the best of three. The target is a million events a second. The machine was shared meanwhile: an
empty loop over two lists made {min(before, bare()) / 1e6:.0f} M turns a second.

| timeline | expandable segments | events | events per second | allocated, MiB | reserved, MiB | more |
|---|---|---:|---:|---:|---:|---:|
""" + "\n".join(rows) + "\n"  # fmt: skip
    (Path(__file__).parent / "allocator.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
