"""The page of `bursar ui` under load: what a moved slider takes, a hundred clients at once, memory, sizes.

    python benchmarks/ui.py [--seconds 30] [--write]

The clients run in this process and the page in its own, on the same machine: what they take from each other is in the
figures.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import http.client
import os
import platform
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


def ms(values: list[float], q: float) -> float:
    """The q-quantile, in milliseconds."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] * 1e3


def held(pid: int, what: str = "VmRSS") -> float:
    """Megabytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+)", status)[1]) * 1024 / 1e6


def spent(pid: int) -> float:
    """Seconds of processor time."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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


def sizes(port: int) -> tuple[int, int]:
    """Bytes of the page with all it asks for, and how many requests that is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def got(path: str) -> bytes:
        connection.request("GET", path)
        return connection.getresponse().read()

    page = got("/")
    files = [got(path) for path in re.findall(r'(?:src|href)="(/static/[^"]+)"', page.decode())]
    connection.close()
    return len(page) + sum(map(len, files)), 1 + len(files)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/ui.md")
    args = parser.parse_args()
    command = [sys.executable, "-m", "bursar", "ui", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().rsplit(":", 1)[1].strip(" /\n"))
        start = held(process.pid)
        size, requests = sizes(port)
        before = spent(process.pid)
        fresh = one_by_one(port, tuple(f"/part?{state}" for state in FRESH))
        cpu = (spent(process.pid) - before) / len(FRESH)
        again = one_by_one(port, tuple(f"/part?{state}" for state in FRESH))
        took, errors = asyncio.run(crowd(port, args.seconds))
        most = held(process.pid, "VmHWM")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
    lines = [
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; "
        "the clients run on the same cores.",
        "",
        "| what | figure | goal |",
        "|---|---|---|",
        f"| moved slider, never asked before: median, 99 % | {ms(fresh, 0.5):.0f}, {ms(fresh, 0.99):.0f} ms | 100 ms |",
        f"| the same, processor time of the page | {cpu * 1e3:.0f} ms | |",
        f"| moved slider, asked before: median, 99 % | {ms(again, 0.5):.1f}, {ms(again, 0.99):.1f} ms | 100 ms |",
        f"| {CLIENTS} clients, {args.seconds:g} s without a pause: replies, errors | {len(took):,}, {len(errors)} "
        "| 0 errors |",
        f"| the same: median, 99 %, longest | {ms(took, 0.5):.0f}, {ms(took, 0.99):.0f}, {ms(took, 1):.0f} ms "
        "| 99 % in 250 ms |",
        f"| memory of the page's process: at the start, at most | {start:.0f}, {most:.0f} MB | 120 MB |",
        f"| the page with all it asks for | {size / 1e3:.0f} kB, {requests} requests | 150 kB, 6 requests |",
        "",
        f"The clients ask for {len(STATES)} set-ups over and over, the first time included: those are the longest.",
        "",
        "| best usual layout against the best of all | usual | all | slower by |",
        "|---|---:|---:|---:|",
        *(f"| {name} | {few:,} | {every:,} | {slower:.2%} |" for name, few, every, slower in regret()),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.write:
        Path(__file__).with_suffix(".md").write_text("# The page under load\n\n" + text, encoding="utf-8")


if __name__ == "__main__":
    main()
