"""The page of `bursar ui` under load: what a moved slider takes, a hundred clients at once, memory, sizes.

    python benchmarks/ui.py [SECONDS]        prints the table of benchmarks/ui.md; 30 seconds of load by default

The clients run in this process and the page in its own, on the same machine: what they take from each other is in the
figures.
"""

from __future__ import annotations

import asyncio
import http.client
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import parse_qsl

from bursar.plan.search import search
from bursar.plan.usual import usual
from bursar.web.answers import asked
from bursar.web.state import parse

CLIENTS = 100
GPUS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
SEQUENCES = (2048, 4096, 8192, 16384)
STATES = tuple(f"gpus={n}&seq={s}" for n in GPUS for s in SEQUENCES)  # what two sliders reach
FRESH = tuple(
    f"gpus={n}&seq={s}&tokens={t}B" for n in (128, 512, 1024, 2048) for s in (4096, 8192) for t in range(11, 31)
)
REGRET = (
    "model=llama3-8b&gpus=64&batch=4M", "model=llama3-70b&gpus=1024", "model=gpt3-175b&gpus=512&seq=2048&batch=3145728",
    "model=mixtral-8x7b&gpus=64&seq=4096&batch=4M", "model=gpt2-xl&gpus=8&seq=1024&batch=524288",
)  # fmt: skip


def quantile(values: list[float], q: float) -> float:
    """The q-quantile, in milliseconds."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] * 1e3


def held(pid: int, what: str = "VmRSS") -> float:
    """Megabytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+)", status)[1]) * 1024 / 1e6


def one_by_one(port: int, paths: tuple[str, ...]) -> list[float]:
    """Seconds of each path, asked one after the other."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    took = []
    for path in paths:
        start = time.perf_counter()
        connection.request("GET", path)
        reply = connection.getresponse()
        reply.read()
        took.append(time.perf_counter() - start)
        assert reply.status == 200, (path, reply.status)
    connection.close()
    return took


async def client(port: int, paths: list[str], until: float, took: list[float], errors: list[str]) -> None:
    """Asks one path after the other on one connection until it is time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for turn in range(1_000_000):
        if time.perf_counter() > until:
            break
        path = paths[turn % len(paths)]
        start = time.perf_counter()
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
        except (OSError, asyncio.IncompleteReadError) as error:
            errors.append(repr(error))
            return
        took.append(time.perf_counter() - start)
        if not head.startswith(b"HTTP/1.1 200"):
            errors.append(head.split(b"\r\n")[0].decode())
    writer.close()


async def crowd(port: int, seconds: float) -> tuple[list[float], list[str]]:
    """All clients at once, none of them waiting between questions, from a page that has answered nothing yet."""
    took: list[float] = []
    errors: list[str] = []
    until = time.perf_counter() + seconds
    paths = [f"/part?{state}&tokens=10T" for state in STATES]
    turns = [paths[i % len(paths) :] + paths[: i % len(paths)] for i in range(CLIENTS)]
    await asyncio.gather(*(client(port, turn, until, took, errors) for turn in turns))
    return took, errors


def regret() -> list[tuple[str, int, int, float]]:
    """How much longer the best of the usual layouts takes than the best of every layout."""
    found = []
    for text in REGRET:
        setup = parse(parse_qsl(text)).first
        question, where = asked(setup)
        few, all_of_them = usual(question, where), search(question, [where], top=1)
        best = all_of_them.layouts[0]
        slower = few.shown.step_seconds / few.shown.batch_tokens / (best.step_seconds / best.batch_tokens) - 1
        found.append((f"{setup.model} on {where.name}", few.plan.searched, all_of_them.searched, slower))
    return found


def main(seconds: float = 30.0) -> None:
    """Print the table."""
    command = [sys.executable, "-m", "bursar", "ui", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().rsplit(":", 1)[1].strip(" /\n"))
        start = held(process.pid)
        one_by_one(port, ("/",))
        fresh = one_by_one(port, tuple(f"/part?{state}" for state in FRESH))
        again = one_by_one(port, tuple(f"/part?{state}" for state in FRESH))
        took, errors = asyncio.run(crowd(port, seconds))
        most = held(process.pid, "VmHWM")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
    print("| what | figure | goal |\n|---|---|---|")
    print(
        f"| moved slider, not asked before: median, 99 % | {quantile(fresh, 0.5):.0f}, {quantile(fresh, 0.99):.0f} ms | 100 ms |"
    )
    print(
        f"| moved slider, asked before: median, 99 % | {quantile(again, 0.5):.1f}, {quantile(again, 0.99):.1f} ms | |"
    )
    print(f"| {CLIENTS} clients, {seconds:g} s: requests, errors | {len(took):,}, {len(errors)} | no error |")
    print(f"| {CLIENTS} clients: median, 99 %, longest | {quantile(took, 0.5):.0f}, {quantile(took, 0.99):.0f}, "
          f"{max(took) * 1e3:.0f} ms | 99 % in 250 ms |")  # fmt: skip
    print(f"| memory of the process: at the start, at most | {start:.0f}, {most:.0f} MB | 120 MB |")
    print("\n| best usual layout against every layout | usual | every | slower by |\n|---|---:|---:|---:|")
    for name, few, every, slower in regret():
        print(f"| {name} | {few:,} | {every:,} | {slower:.2%} |")


if __name__ == "__main__":
    main(*(float(a) for a in sys.argv[1:2]))
