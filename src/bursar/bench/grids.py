# ruff: noqa: B023  (every closure here has run before its loop goes on)
"""What is measured for the curves: products, attention, convolutions, ops by name, bandwidth."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bursar.bench import clock
from bursar.bench.single import Bench
from bursar.calibration import Point
from bursar.context import FAR, HOT, NEAR, State, arguments, distinct
from bursar.ledger import Call, Operand

Say = Callable[[str], None]
TORCH = {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64", "fp16": "float16"}
LAYOUTS = ("NN", "NT", "TN")
SIZES = (16, 64, 256, 1024, 4096)
FEW = (64, 512, 2048)
MOST_PRODUCT = 2**28  # multiply-adds of one product: 0.5 GFLOP
MOST_ELEMENTS = 2**23


def operand(*shape: int, dtype: str = "fp32", storage: int = 0, transposed: bool = False) -> Operand:
    """A contiguous tensor, or one whose last two dimensions are those of a contiguous one in turn."""
    held = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    stride = [math.prod(held[i + 1 :]) for i in range(len(held))]
    if transposed:
        stride[-2:] = stride[-1], stride[-2]
    return Operand(tuple(shape), tuple(stride), TORCH.get(dtype, dtype), storage)


def call(op: str, *args: Any, out: tuple[Operand, ...] = (), **kwargs: Any) -> Call:
    """A call of ``aten.op``, an overload given after a dot, its tensors in storages of their own."""
    numbers = itertools.count()

    def own(value: Any) -> Any:
        if isinstance(value, Operand):
            return value._replace(storage=next(numbers)) if value.storage == 0 else value
        return tuple(map(own, value)) if isinstance(value, tuple) else value

    name = op if "." in op else f"{op}.default"
    return Call(f"aten.{name}", tuple(map(own, args)), tuple((k, own(v)) for k, v in kwargs.items()), out, 0, 0)


def state(made: Call, level: int) -> State:
    """All of its operands hot, or all far."""
    return State((level,) * len(distinct(arguments(made))), level, min(level, NEAR))


def matmul(bench: Bench, dtype: str, sizes: tuple[int, ...], layouts: tuple[str, ...]) -> dict[str, tuple[Point, ...]]:
    """(M, N, K, seconds) of products, their operands cold, by layout."""
    found: dict[str, tuple[Point, ...]] = {}
    for layout in layouts:
        points = []
        for m, n, k in itertools.product(sizes, repeat=3):
            if m * n * k > MOST_PRODUCT or max(m * n, m * k, n * k) > MOST_ELEMENTS:
                continue
            a = operand(m, k, dtype=dtype, transposed=layout[0] == "T")
            b = operand(k, n, dtype=dtype, transposed=layout[1] == "T")
            made = call("mm", a, b, out=(operand(m, n, dtype=dtype, storage=-1),))
            seconds = bench.seconds(made, state(made, FAR), budget=3e-3)
            if seconds is not None:
                points.append((m, n, k, seconds))
        if points:
            found[layout] = tuple(points)
    return found


def attention(dtype: str, lengths: tuple[int, ...]) -> dict[str, tuple[Point, ...]]:
    """(S, FLOP/s) of the fused kernel, causal, forward and backward: 4 and 10 FLOPs a pair and dimension."""
    found: dict[str, list[Point]] = {"forward": [], "backward": []}
    aten = torch.ops.aten
    for s in lengths:
        b, h, d = max(1, 1024 // s), 4, 64
        q, k, v = (torch.randn(b, h, s, d).to(getattr(torch, TORCH[dtype])) for _ in range(3))
        pairs = s * (s + 1) // 2
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        gradient = torch.randn_like(out)
        for way, flops, run in (
            ("forward", 4, lambda: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)),
            ("backward", 10, lambda: aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient, q, k, v, out, lse, 0.0, True)),
        ):  # fmt: skip
            seconds, _ = clock.median(run)
            found[way].append((s, flops * pairs * d * b * h / seconds))
    return {way: tuple(points) for way, points in found.items()}


CONVOLUTIONS = ((3, 32, 32, 16), (32, 64, 16, 16), (64, 64, 32, 4), (64, 128, 8, 16), (128, 128, 16, 8))


def convolution(bench: Bench, product: Callable[[int, int, int], float]) -> dict[str, float]:
    """Of some 3x3 convolutions, the rate over that of the equivalent product, by direction: the median."""
    found: dict[str, list[float]] = {"forward": [], "backward": []}
    for c_in, c_out, side, b in CONVOLUTIONS:
        x, w, y = operand(b, c_in, side, side), operand(c_out, c_in, 3, 3), operand(b, c_out, side, side)
        rest = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
        equivalent = product(b * side * side, c_out, 9 * c_in)
        forward = call("convolution", x, w, None, *rest, out=(y._replace(storage=-1),))
        mask = (c_in > 3, True, True)
        backward = call("convolution_backward", y, x, w, (c_out,), *rest, mask, out=(w._replace(storage=-1),))
        for way, made, times in (("forward", forward, 1), ("backward", backward, 2 if mask[0] else 1)):
            seconds = bench.seconds(made, state(made, FAR))
            if seconds:
                found[way].append(times * equivalent / seconds)
    return {way: statistics.median(shares) if shares else 1.0 for way, shares in found.items()}


def named(rows: int, dtype: str) -> Iterator[tuple[str, Call]]:
    """A call of each op that has a curve, on ``rows`` x 512 elements."""
    c = 512

    def t(*shape: int, d: str = dtype) -> Operand:
        return operand(*shape, dtype=d)

    x = t(rows, c)
    out = (x._replace(storage=-1),)
    images = t(rows // 8, 64, 8, 8)
    w, stat, idx = t(c), t(rows, 1), t(rows, d="int64")
    channels = t(64)
    for name in "relu gelu tanh sigmoid exp silu rsqrt sqrt neg sin cos log hardswish abs clone".split():
        yield name, call(name, x, out=out)
    yield "pow", call("pow.Tensor_Scalar", x, 2, out=out)
    for name in ("add", "mul", "div", "sub"):
        yield name, call(f"{name}.Tensor", x, x, out=out)
        yield f"{name}_scalar", call(f"{name}.Tensor", x, 1.5, out=out)
    for name in ("add_", "mul_"):
        yield name, call(f"{name}.Tensor", x, x)
        yield f"{name}_scalar", call(f"{name}.Tensor", x, 0.999)
    yield "lerp_", call("lerp_.Scalar", x, x, 1e-3)
    yield "addcmul_", call("addcmul_", x, x, x, value=1e-3)
    yield "addcdiv_", call("addcdiv_", x, x, x, value=1e-3)
    yield "copy_", call("copy_", x, x)
    yield "fill_", call("fill_.Scalar", x, 1.0)
    yield "zero_", call("zero_", x)
    yield "_to_copy", call("_to_copy", x, out=out)
    yield "where", call("where.self", operand(rows, c, dtype="bool"), x, x, out=out)
    yield "masked_fill", call("masked_fill.Scalar", x, operand(rows, c, dtype="bool"), 0.0, out=out)
    yield "threshold_backward", call("threshold_backward", x, x, 0, out=out)
    for name in "gelu_backward silu_backward sigmoid_backward tanh_backward hardswish_backward".split():
        yield name, call(name, x, x, out=out)
    yield "_softmax", call("_softmax", x, -1, False, out=out)
    yield "_softmax_backward_data", call("_softmax_backward_data", x, x, -1, getattr(torch, TORCH[dtype]), out=out)
    yield "_log_softmax", call("_log_softmax", x, -1, False, out=out)
    yield ("_log_softmax_backward_data",
           call("_log_softmax_backward_data", x, x, -1, getattr(torch, TORCH[dtype]), out=out))  # fmt: skip
    yield "native_layer_norm", call("native_layer_norm", x, (c,), w, w, 1e-5, out=out)
    yield ("native_layer_norm_backward",
           call("native_layer_norm_backward", x, x, (c,), stat, stat, w, w, (True, True, True), out=out))  # fmt: skip
    yield "sum", call("sum.dim_IntList", x, (0,), True)
    yield "mean", call("mean.dim", x, (-1,), True)
    yield "cat", call("cat", (t(rows, c // 2), t(rows, c // 2)), 1, out=out)
    table = t(1024, c)
    yield "embedding", call("embedding", table, idx, out=out)
    yield ("embedding_dense_backward",
           call("embedding_dense_backward", x, idx, 1024, -1, False, out=(table._replace(storage=-1),)))  # fmt: skip
    yield "index_select", call("index_select", x, 0, idx, out=out)
    yield (
        "native_batch_norm",
        call("native_batch_norm", images, channels, channels, channels, channels, True, 0.1, 1e-5, out=out),
    )
    mask = (True, True, True)
    yield ("native_batch_norm_backward", call("native_batch_norm_backward", images, images, *[channels] * 5, True, 1e-5,
                                              mask, out=out))  # fmt: skip
    n = rows // 8
    yield "native_group_norm", call("native_group_norm", images, channels, channels, n, 64, 64, 8, 1e-5, out=out)
    yield ("native_group_norm_backward", call("native_group_norm_backward", images, images, t(n, 8), t(n, 8), channels,
                                              n, 64, 64, 8, mask, out=out))  # fmt: skip
    halved = t(rows // 8, 64, 4, 4)._replace(storage=-1)
    yield "max_pool2d_with_indices", call("max_pool2d_with_indices", images, (2, 2), out=(halved,))
    yield "avg_pool2d", call("avg_pool2d", images, (2, 2), out=(halved,))


def ops(bench: Bench, dtype: str, rows: tuple[int, ...]) -> dict[str, dict[str, tuple[Point, ...]]]:
    """(elements, seconds) of each named op, its operands hot and cold. An op that does not run here is left out."""
    found: dict[str, dict[str, list[Point]]] = {}
    for r in rows:
        for name, made in named(r, dtype):
            for level, label in ((HOT, "hot"), (FAR, "cold")):
                seconds = bench.seconds(made, state(made, level), budget=1e-3)
                if seconds is not None:
                    elements = max(math.prod(o.shape) for o in (*arguments(made), *made.outputs))
                    found.setdefault(name, {"hot": [], "cold": []})[label].append((elements, seconds))
    return {
        name: {label: tuple(sorted(points)) for label, points in by.items()}
        for name, by in found.items()
        if by["hot"] and by["cold"]
    }


def bandwidth(most_bytes: int) -> dict[str, tuple[Point, ...]]:
    """(bytes, bytes/s): read, written, copied (both counted), and written to pages fresh from the system."""
    found: dict[str, list[Point]] = {"read": [], "write": [], "copy": [], "fresh": []}
    size = 2**14
    while size <= most_bytes:
        x, y = torch.ones(size // 4), torch.ones(size // 4)
        runs: list[tuple[str, int, Callable[[], Any]]] = [
            ("read", size, x.sum), ("write", size, lambda: x.fill_(1.0)), ("copy", 2 * size, lambda: y.copy_(x)),
        ]  # fmt: skip
        if size > 2**25:  # the C library takes larger blocks from the system each time
            runs.append(("fresh", size, lambda: torch.empty(size // 4).fill_(1.0)))
        for name, moved, run in runs:
            repeats = max(1, 2**18 // size)

            def many(run: Callable[[], Any] = run, repeats: int = repeats) -> None:
                for _ in range(repeats):
                    run()

            seconds, _ = clock.median(many, budget=3e-3, fewest=3)
            found[name].append((size, moved * repeats / seconds))
        size *= 4 if size < 2**20 else 8
    return {name: tuple(points) for name, points in found.items()}
