"""Chapter 7 of the notes: what operations cost, MFU, and how long a run takes.

B batch   D width   K width out   m, n, p sizes of a matrix
"""

# ruff: noqa: D103 (a claim's row in catalog/lecture.toml says what its function executes)

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from bursar.hardware import accelerator, accelerators
from bursar.lecture import Claim, Finding, claim, close, shared
from bursar.lecture.traces import (
    matmul_flops,
    product_share,
    product_time_share,
    seconds_by_kind,
    step,
    traced,
    whole,
    zeros,
)
from bursar.ledger import Ledger
from bursar.rules.attention import pairs
from bursar.run import Run, magnitude, magnitudes, solve
from bursar.units import SECONDS_PER_YEAR, format_count, format_flops, format_rate, format_seconds, format_share

SHAPES = ((2, 3, 5), (64, 512, 10), (1024, 256, 64))
H100, A100, B200 = "h100-sxm", "a100-80g-sxm", "b200"
GPT2 = {"batch_size": 1, "seq_len": 1024, "precision": "bf16-mixed"}


# ---- quantities and peaks


@claim("7.1")
def amount_and_speed(notes: Claim) -> Finding:
    work = {on: step("two-layer", precision="bf16", on=on).flops.model for on in (A100, H100)}
    peaks = {on: accelerator(on).peak("bf16") for on in work}
    return Finding(
        f"one step of two-layer is {format_flops(work[A100])} on an A100 and {format_flops(work[H100])} on an H100; "
        f"their peaks are {format_rate(peaks[A100], 'FLOP')} and {format_rate(peaks[H100], 'FLOP')}",
        {"the work is the same on both": work[A100] == work[H100], "the speed is not": peaks[A100] != peaks[H100]},
        numbers=(work[A100], work[H100], peaks[A100], peaks[H100]),
    )


@claim("7.2")
def gpt3(notes: Claim) -> Finding:
    n_tokens = notes.given["tokens"]
    from_shape = whole("gpt3-175b", 2048)
    by_rule = solve(parameters=from_shape.parameters, tokens=n_tokens, on=H100).flops
    published = magnitude("gpt3").flops
    return Finding(
        f"{format_flops(by_rule)} = 6 · {format_count(from_shape.parameters, 4)} · {format_count(n_tokens)} tokens; "
        f"published {format_flops(published)}",
        {"as published": close(published, notes.value), "6·N·D of its shape": close(by_rule, notes.value)},
        numbers=(by_rule, published),
    )


@claim("7.3")
def a100_peak(notes: Claim) -> Finding:
    peaks = {dtype: accelerator(A100).peak(dtype) for dtype in ("bf16", "tf32", "fp32")}
    return Finding(
        _rates(peaks) + ", dense",
        {f"in {dtype}, dense": close(peak, notes.value) for dtype, peak in peaks.items()},
        numbers=tuple(peaks.values()),
    )


@claim("7.4")
def h100_peak(notes: Claim) -> Finding:
    sxm, pcie = accelerator(H100).peak("bf16"), accelerator("h100-pcie").peak("bf16")
    return Finding(
        f"{format_rate(sxm, 'FLOP')} in bf16, dense (the PCIe part {format_rate(pcie, 'FLOP')})",
        {"the SXM5 part, bf16, dense": close(sxm, notes.value)},
        numbers=(sxm, pcie),
    )


# ---- operations


@claim("7.5")
def matmul(notes: Claim) -> Finding:
    counted = {(B, D, K): matmul_flops(B, D, K) for B, D, K in SHAPES}
    return Finding(
        "; ".join(f"({B}, {D}) @ ({D}, {K}) is {n} FLOP" for (B, D, K), n in counted.items()),
        {f"2·{B}·{D}·{K}": n == 2 * B * D * K for (B, D, K), n in counted.items()},
        numbers=tuple(counted.values()),
    )


@claim("7.6")
def large_matmul(notes: Claim) -> Finding:
    n = matmul_flops(notes.given["B"], notes.given["D"], notes.given["K"])
    power = n.bit_length() - 1
    exactly = f" = 2^{power}" if n == 2**power else ""
    return Finding(f"{n} FLOP{exactly}, {format_flops(n)}", {"as stated": close(n, notes.value)}, numbers=(n,))


def _relu(m: int, n: int) -> Ledger:
    return traced(lambda: F.relu(zeros(m, n, dtype=torch.bfloat16)))


def _sum_flops(m: int, n: int) -> int:
    return traced(lambda: zeros(m, n) + zeros(m, n)).flops.total


@claim("7.7")
def element_wise(notes: Claim) -> Finding:
    counted = {(m, n): _relu(m, n).flops.by_kind["elementwise"] for m, n, _ in SHAPES}
    gpt2 = step("gpt2", **GPT2)
    relu = _relu(1024, 1024).recorded[-1].work
    intensity = relu.flops / (relu.read_bytes + relu.written_bytes)
    ridge = accelerator(H100).ridge("bf16")
    seconds = seconds_by_kind(gpt2, H100)
    in_flops = gpt2.flops.by_kind["elementwise"] / gpt2.flops.total
    in_time = seconds["elementwise"] / sum(seconds.values())
    return Finding(
        f"m·n FLOP; in a step of GPT-2 {format_share(in_flops, 2)} of the FLOPs and {format_share(in_time)} of the "
        f"time on an H100: a bf16 ReLU does {intensity:.3g} FLOP per byte, the H100 needs {ridge:.4g} to be busy",
        {
            "m·n FLOPs": all(done == m * n for (m, n), done in counted.items()),
            "under 1 % of a step's FLOPs": in_flops < 0.01,
        },
        {"under 1 % of its time": in_time < 0.01, "bound by compute": intensity > ridge},
        numbers=(in_flops, in_time, intensity, ridge),
    )


@claim("7.8")
def addition(notes: Claim) -> Finding:
    counted = {(m, n): _sum_flops(m, n) for m, n, _ in SHAPES}
    return Finding(
        "; ".join(f"({m}, {n}) is {k} FLOP" for (m, n), k in counted.items()),
        {f"{m}·{n}": k == m * n for (m, n), k in counted.items()},
        numbers=tuple(counted.values()),
    )


@claim("7.9")
def matmul_dominates(notes: Claim) -> Finding:
    counted = {shape: matmul_flops(*shape) for shape in SHAPES}
    ledger = step("gpt2", **GPT2)
    share = product_share(ledger)
    return Finding(
        f"2·m·n·p at {len(counted)} shapes; {format_share(share)} of the FLOPs of a step of GPT-2",
        {
            "2·m·n·p": all(n == 2 * a * b * c for (a, b, c), n in counted.items()),
            "the largest share of a step's FLOPs": share > 0.5,
        },
        numbers=(*counted.values(), share),
    )


# N, Cin, Cout, image side, kernel side, stride, groups: ResNet's first, a plain one, a grouped, a depthwise
CONVOLUTIONS = ((8, 3, 64, 224, 7, 2, 1), (2, 16, 32, 14, 3, 1, 1), (2, 16, 32, 14, 3, 1, 4), (2, 16, 16, 14, 3, 1, 16))


@shared
def convolution_flops(N: int, c_in: int, c_out: int, side: int, k: int, stride: int, groups: int) -> tuple[int, int]:
    """FLOPs of one convolution, padded by half its kernel, and the side of what comes out."""
    found: list[int] = []

    def run() -> None:
        y = F.conv2d(zeros(N, c_in, side, side), zeros(c_out, c_in // groups, k, k), None, stride, k // 2, 1, groups)
        found.append(y.shape[-1])

    return traced(run).flops.forward, found[0]


@claim("7.10")
def convolution(notes: Claim) -> Finding:
    as_matmul, by_formula, counted = [], [], []
    for N, c_in, c_out, side, k, stride, groups in CONVOLUTIONS:
        n, out = convolution_flops(N, c_in, c_out, side, k, stride, groups)
        counted.append(n)
        as_matmul.append(groups * matmul_flops(N * out * out, c_in // groups * k * k, c_out // groups))
        by_formula.append(2 * N * c_out * out * out * (c_in // groups) * k * k)
    return Finding(
        f"{counted[0]} FLOP for ResNet's first convolution, a batch of {CONVOLUTIONS[0][0]}; "
        f"2·N·Cout·Ho·Wo·(Cin/groups)·kh·kw gives {by_formula[0]}",
        {"it costs what its matmul costs (im2col)": counted == as_matmul},
        {"no formula gives it": counted != by_formula},
        numbers=tuple(counted),
    )


# ---- MFU


@claim("7.11")
def mfu(notes: Claim) -> Finding:
    ledger = step("gpt2:L=2", batch_size=1, seq_len=1024, precision="bf16", recompute="full")
    forecast = ledger.on(H100)
    by_formula = ledger.flops.model / forecast.seconds / accelerator(H100).peak("bf16")
    return Finding(
        f"a forecast's MFU is {forecast.mfu:.4f}, its model FLOP/s over the peak {by_formula:.4f}; "
        f"with recomputed FLOPs counted as actual it would be {forecast.hfu:.4f} (HFU)",
        {"actual model FLOP/s over the dtype's dense peak": close(forecast.mfu, by_formula, 1e-9)},
        numbers=(forecast.mfu, by_formula, forecast.hfu),
    )


@claim("7.12")
def fp32_mfu(notes: Claim) -> Finding:
    given = notes.given
    found = {on: given["achieved_flops_per_s"] / accelerator(on).peak("fp32") for on in (A100, H100)}
    course = given["course_flops_per_s"] / given["course_peak_flops_per_s"]
    return Finding(
        f"{found[A100]:.2f} on an A100 (FP32 peak {format_rate(accelerator(A100).peak('fp32'), 'FLOP')}), "
        f"{found[H100]:.2f} on an H100; the course's own FP32 run {course:.3f}",
        {f"against the FP32 peak of {on}": close(value, notes.value, 0.05) for on, value in found.items()},
        numbers=(*found.values(), course),
    )


@claim("7.13")
def bf16_mfu(notes: Claim) -> Finding:
    given = notes.given
    found = given["achieved_flops_per_s"] / accelerator(H100).peak("bf16")
    course = given["course_flops_per_s"] / accelerator(H100).peak("bf16")
    return Finding(
        f"{found:.3f} by these figures; the course's own BF16 run {course:.3f}",
        {"82 of the H100's BF16 peak": close(found, notes.value, 0.05)},
        {"an H100 reaches no more": close(course, notes.value, 0.05)},
        numbers=(found, course),
    )


@claim("7.14")
def published_mfu(notes: Claim) -> Finding:
    low, high, excellent = notes.values
    found = {run["name"]: _published(run) for run in notes.given["runs"]}
    return Finding(
        "6·N·D over GPU-time at dense peak: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()),
        {
            f"{excellent} is above most of these runs": sum(v >= excellent for v in found.values()) < len(found) / 2,
            **{name: low <= value <= high for name, value in found.items()},
        },
        numbers=tuple(found.values()),
    )


def _published(run: Mapping[str, Any]) -> float:
    """MFU of a published run, from its tokens and its GPU-hours, or its tokens of one second."""
    hours = run.get("gpu_hours")
    n_gpus, seconds = (1, hours * 3600) if hours else (run["gpus"], run["seconds"])
    device = accelerator(run["on"])
    return solve(parameters=run["parameters"], tokens=run["tokens"], on=device, gpus=n_gpus, seconds=seconds).mfu


# ---- runs


def _on_one_h100(notes: Claim) -> Finding:
    work = magnitude(notes.given["run"])
    runs = {
        mfu: solve(flops=work.flops, on=accelerator(H100), gpus=1, mfu=mfu)
        for mfu in (1.0, notes.given["mfu_elsewhere"])
    }
    years = {mfu: run.seconds / SECONDS_PER_YEAR for mfu, run in runs.items()}
    return Finding(
        ", ".join(f"{_years(run)} at MFU {mfu}" for mfu, run in runs.items()),
        {"at an MFU of 1": close(years[1.0], notes.value)},
        {"at the MFU the notes use elsewhere": close(years[notes.given["mfu_elsewhere"]], notes.value)},
        numbers=tuple(years.values()),
    )


def _years(run: Run) -> str:
    return f"{round(run.years)} years" if run.years >= 100 else format_seconds(run.seconds)


for _id in ("7.15", "7.16", "7.17"):
    claim(_id)(_on_one_h100)


@claim("7.18")
def gpt4(notes: Claim) -> Finding:
    known = magnitude("gpt4-rumour")
    return Finding(
        f"{format_flops(known.flops)}, {known.status} ({known.source})",
        {"the figure": close(known.flops, notes.value), "as speculation": known.status == "rumour"},
        numbers=(known.flops,),
    )


@claim("7.19")
def threshold(notes: Claim) -> Finding:
    known = magnitude("us-1e26")
    in_force = [m for m in magnitudes() if m.status == "law"]
    return Finding(
        f"{format_flops(known.flops)}, {known.status}; in force: "
        + ", ".join(f"{m.name}, {format_flops(m.flops)}" for m in in_force),
        {"the figure of the US order": close(known.flops, notes.value)},
        {"in force": known.status == "law"},
        numbers=(known.flops, *(m.flops for m in in_force)),
    )


# ---- precision and what limits


@claim("7.20")
def tensor_cores(notes: Claim) -> Finding:
    found = {
        a.name: a.peak("bf16") / a.peak("fp32") for a in accelerators() if {"bf16", "fp32"} <= set(a.peak_flops_per_s)
    }
    known = {name: found[name] for name in (A100, H100, B200)}
    return Finding(
        ", ".join(f"{name} {ratio:.1f} times" for name, ratio in known.items())
        + f"; at least {min(found.values()):.3g} times on {len(found)} accelerators of the catalogue",
        {name: ratio > 1 for name, ratio in known.items()},
        numbers=tuple(known.values()),
    )


@claim("7.21")
def limits(notes: Claim) -> Finding:
    forecast = step("gpt2", **GPT2).on("16xh100-sxm")
    bound = forecast.bound_by
    return Finding(
        f"a step of GPT-2 on 16 H100, MFU {forecast.mfu:.2f}: "
        + ", ".join(f"{what} {format_share(seconds / forecast.seconds)}" for what, seconds in bound.items())
        + f" of the time ({forecast.basis})",
        {
            "memory bandwidth takes time": bound["memory"] > 0,
            "scheduling takes time": bound["overhead"] > 0,
            "communication takes time": bound["network"] > 0,
            "so MFU stays below 1": forecast.mfu < 1,
        },
        numbers=(forecast.mfu, *bound.values()),
    )


@claim("7.22")
def bf16_over_fp32(notes: Claim) -> Finding:
    over_fp32 = {on: accelerator(on).peak("bf16") / accelerator(on).peak("fp32") for on in (A100, H100, B200)}
    over_tf32 = accelerator(A100).peak("bf16") / accelerator(A100).peak("tf32")
    return Finding(
        ", ".join(f"{on} {ratio:.1f}x" for on, ratio in over_fp32.items()) + f"; against TF32 {over_tf32:.1f}x",
        {
            **{f"{on}, against FP32": close(ratio, notes.value) for on, ratio in over_fp32.items()},
            "against TF32": close(over_tf32, notes.value),
        },
        numbers=(*over_fp32.values(), over_tf32),
    )


@claim("7.23")
def mfu_in_bf16(notes: Claim) -> Finding:
    given = notes.given
    fp32 = given["fp32_flops_per_s"] / given["fp32_peak_flops_per_s"]
    bf16 = given["bf16_flops_per_s"] / accelerator(H100).peak("bf16")
    faster = given["bf16_flops_per_s"] / given["fp32_flops_per_s"]
    return Finding(
        f"the course's run: MFU {fp32:.3f} in FP32, {bf16:.3f} in BF16 ({format_share(bf16 / fp32 - 1, 0)}), "
        f"and {faster:.1f} times the throughput",
        {"MFU gains little": bf16 - fp32 < 0.1},
        {"it rises": bf16 > fp32},
        numbers=(fp32, bf16, faster),
    )


@claim("7.24")
def share_of_matmuls(notes: Claim) -> Finding:
    found = {
        "GPT-2, 1024 tokens": step("gpt2", **GPT2),
        "the notes' Cruncher": step("cruncher"),
    }
    shares = {name: product_share(ledger) for name, ledger in found.items()}
    in_time = product_time_share(found["GPT-2, 1024 tokens"], H100)
    return Finding(
        ", ".join(f"{name} {format_share(share)}" for name, share in shares.items())
        + f"; of GPT-2's time on an H100 {format_share(in_time)}",
        {name: share >= notes.value / 100 for name, share in shares.items()},
        numbers=(*shares.values(), in_time),
    )


# ---- scaling


@claim("7.25")
def six_n_d(notes: Claim) -> Finding:
    found = {name: whole(name, 2048) for name in ("gpt3-175b", "llama3-70b")}
    factors = {name: x.model_flops / (x.parameters * x.tokens) for name, x in found.items()}
    gpt3 = found["gpt3-175b"]
    extra = gpt3.attention_full_square_flops / gpt3.six_p_tokens
    return Finding(
        ", ".join(f"{name} {factor:.2f}·N·D" for name, factor in factors.items())
        + f" counted, causal attention included; attention in full square is {format_share(extra)} of GPT-3's 6·N·D",
        {f"{name}, to 5 %": close(factor, 6, 0.05) for name, factor in factors.items()},
        numbers=(*factors.values(), extra),
    )


def _notes_run(notes: Claim) -> Run:
    """The notes' run: 70B parameters, 15T tokens, on H100s where their number is given."""
    given = notes.given
    return solve(
        parameters=given["parameters"],
        tokens=given["tokens"],
        on=accelerator(H100),
        gpus=given.get("gpus", 1),
        mfu=given.get("mfu"),
    )


@claim("7.26")
def seventy_billion(notes: Claim) -> Finding:
    run = _notes_run(notes)
    return Finding(format_flops(run.flops), {"6·N·D": close(run.flops, notes.value)}, numbers=(run.flops,))


@claim("7.27")
def days(notes: Claim) -> Finding:
    run = _notes_run(notes)
    return Finding(
        f"{format_seconds(run.seconds)} ({run.days:.2f})",
        {"as stated": close(run.days, notes.value)},
        numbers=(run.days,),
    )


@claim("7.28")
def sparse_attention(notes: Claim) -> Finding:
    masked, full = (_attention_block(causal) for causal in (True, False))
    weights = {name: x.flops.by_kind["matmul"] for name, x in (("causal", masked), ("full", full))}
    gpt3, T, window = whole("gpt3-175b", 2048), 2048, 128
    share = gpt3.attention_full_square_flops / gpt3.six_p_tokens
    banded = share * pairs(T, T, causal=True, left=window) / pairs(T, T)
    return Finding(
        f"products with weights: {weights['full']} FLOP without a mask, {weights['causal']} with one; attention's own "
        f"term, {format_share(share)} of 6·N·D for GPT-3 at {T}, falls to {format_share(banded, 2)} with a window of "
        f"{window}",
        {"a mask lowers the products with weights": weights["causal"] < weights["full"]},
        numbers=(share, banded, *weights.values()),
    )


@shared
def _attention_block(causal: bool) -> Ledger:
    """One attention layer, forward and backward: two products with weights around the scores."""

    def run() -> None:
        B, S, H, d = 2, 64, 2, 16
        w_qkv, w_out = (zeros(H * d, n).requires_grad_() for n in (3 * H * d, H * d))
        x = zeros(B, S, H * d).requires_grad_()
        q, k, v = (t.view(B, S, H, d).transpose(1, 2) for t in (x @ w_qkv).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        (y.transpose(1, 2).reshape(B, S, H * d) @ w_out).sum().backward()

    return traced(run)


@claim("7.29")
def levers(notes: Claim) -> Finding:
    slow, fast = (solve(parameters="70B", tokens="15T", on="1024xh100-sxm", mfu=mfu) for mfu in (0.25, 0.5))
    small, large = (step("gpt2", **{**GPT2, "batch_size": B}) for B in (1, 8))
    shares = [product_time_share(x, H100) for x in (small, large)]
    used = [x.on(H100).mfu for x in (small, large)]
    return Finding(
        f"70B on 15T: {format_seconds(slow.seconds)} at MFU {slow.mfu}, {format_seconds(fast.seconds)} at {fast.mfu}; "
        f"GPT-2 with matmuls {format_share(shares[0], 0)} of the time has MFU {used[0]:.2f}, with "
        f"{format_share(shares[1], 0)} {used[1]:.2f}",
        {
            "twice the MFU, half the time": close(slow.seconds, 2 * fast.seconds, 1e-9),
            "less time outside matmuls, more MFU": shares[1] > shares[0] and used[1] > used[0],
        },
        numbers=(slow.days, fast.days, *shares, *used),
    )


def _rates(peaks: dict[str, float]) -> str:
    return ", ".join(f"{dtype} {format_rate(peak, 'FLOP')}" for dtype, peak in peaks.items())
