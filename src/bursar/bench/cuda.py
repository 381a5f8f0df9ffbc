# ruff: noqa: B023  (every closure here has run before its loop goes on)
"""A CUDA device measured: products, attention, bandwidth, the launch of a kernel and of a graph.

Times are those between two events in the stream, so nothing here waits for the host. Where no CUDA device is, nothing
of this runs; it was written against torch 2.13's interface and has not been run on a GPU yet.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch

from bursar.calibration import Point

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = (512, 1024, 2048, 4096, 8192)


def seconds(run: Callable[[], Any], repeats: int = 7) -> float:
    """Median seconds of ``run`` by events, after a warm-up."""
    run()
    found = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(found)


def matmul(dtype: str, sizes: tuple[int, ...] = SIZES) -> dict[str, tuple[Point, ...]]:
    """(M, N, K, seconds) of products, by layout; TF32 is on for ``tf32`` and off for ``fp32``."""
    was = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    found: dict[str, tuple[Point, ...]] = {}
    try:
        for layout in ("NN", "NT", "TN"):
            points = []
            for m, n, k in itertools.product(sizes, repeat=3):
                a = torch.randn(k, m, device="cuda").t() if layout[0] == "T" else torch.randn(m, k, device="cuda")
                b = torch.randn(n, k, device="cuda").t() if layout[1] == "T" else torch.randn(k, n, device="cuda")
                a, b = a.to(DTYPES[dtype]), b.to(DTYPES[dtype])
                points.append((m, n, k, seconds(lambda: a @ b)))
            found[layout] = tuple(points)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = was
    return found


def attention(dtype: str, lengths: tuple[int, ...] = (512, 1024, 2048, 4096)) -> dict[str, tuple[Point, ...]]:
    """(S, FLOP/s) of causal attention, forward and backward, with 4 and 8 FLOPs a pair and dimension."""
    found: dict[str, list[Point]] = {"forward": [], "backward": []}
    for s in lengths:
        b, h, d = max(1, 8192 // s), 16, 64
        q, k, v = (torch.randn(b, h, s, d, device="cuda", dtype=DTYPES[dtype], requires_grad=True) for _ in range(3))

        def forward() -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        pairs = b * h * d * s * (s + 1) // 2
        found["forward"].append((s, 4 * pairs / seconds(forward)))
        out = forward()
        gradient = torch.randn_like(out)
        took = seconds(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True))
        found["backward"].append((s, 8 * pairs / took))
    return {way: tuple(points) for way, points in found.items()}


def bandwidth(most_bytes: int = 2**31) -> dict[str, tuple[Point, ...]]:
    """(bytes, bytes/s): read, written, copied with both counted."""
    found: dict[str, list[Point]] = {"read": [], "write": [], "copy": []}
    size = 2**20
    while size <= most_bytes:
        x, y = torch.ones(size // 4, device="cuda"), torch.ones(size // 4, device="cuda")
        found["read"].append((size, size / seconds(x.sum)))
        found["write"].append((size, size / seconds(lambda: x.fill_(1.0))))
        found["copy"].append((size, 2 * size / seconds(lambda: y.copy_(x))))
        size *= 8
    return {name: tuple(points) for name, points in found.items()}


def launch(kernels: int = 200) -> dict[str, float]:
    """Seconds per launch of a tiny kernel in a stream, and per kernel of a graph of them replayed."""
    x = torch.ones(8, device="cuda")

    def many() -> None:
        for _ in range(kernels):
            x.add_(1.0)

    eager = seconds(many) / kernels
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        many()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        many()
    return {"kernel": eager, "graph_kernel": seconds(graph.replay) / kernels}
