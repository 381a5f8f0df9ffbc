"""Seconds of an operation on a GPU, from its size: no efficiency is one constant. No torch.

    product     waves of tiles on the device's units, a tile's own start and end, or the bytes it moves
    attention   a fused kernel's published rate, by sequence and head
    stream      bytes over the bandwidth that streaming kernels reach
    host        what Python and the launch take, where the device is faster than the host

Each number that is neither counted nor a datasheet's is a row of ``catalog/coefficients.toml`` with its source.
Sizes may be NumPy arrays; they broadcast.

    M rows   N columns   K inner
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from bursar.errors import UnknownName
from bursar.hardware import Accelerator, accelerator

Seconds = Any  # a float, or an array of them
Count = Any


@dataclass(frozen=True, slots=True)
class Coefficient:
    """One row of ``catalog/coefficients.toml``."""

    name: str
    value: float
    unit: str
    source: str


@cache
def coefficients() -> Mapping[str, Coefficient]:
    """Every row, by name."""
    text = files("bursar").joinpath("catalog", "coefficients.toml").read_text(encoding="utf-8")
    return {name: Coefficient(name, **row) for name, row in tomllib.loads(text).items()}


def coefficient(name: str) -> float:
    """The value of the row called ``name``. Raises UnknownName."""
    rows = coefficients()
    if name not in rows:
        raise UnknownName("coefficient", name, rows, "Add a row to catalog/coefficients.toml.")
    return rows[name].value


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device reaches. FLOP/s, bytes/s and seconds."""

    device: Accelerator
    ceilings: Mapping[str, float]  # of a product, by dtype
    attention_forward: float  # of fused attention, long sequences, heads of 128
    attention_backward: float
    bytes_per_s: float
    units: int  # SMs or compute units
    gap_seconds: float  # between two kernels


# A fused attention's kernel by the device's generation: what a framework's default resolves to there.
_GENERATIONS = {
    "hopper": ("h100", "h200", "h800", "gh200"),
    "blackwell": ("b200", "b300", "gb200", "gb300"),
}
_UNITS = 108  # where the catalogue has none: of an A100


def generation(device: Accelerator) -> str:
    """ampere, hopper or blackwell: whose kernels the device runs; ampere's where it is none of these."""
    stem = device.name.split("-")[0]
    return next((name for name, stems in _GENERATIONS.items() if stem in stems), "ampere")


@cache
def _ceiling(device: Accelerator, dtype: str) -> float:
    """FLOP/s of the best product in ``dtype``: the best anyone has published, or the share of peak of its like."""
    measured = device.measured_matmul_flops_per_s.get(dtype)
    if measured is None and dtype == "fp16":
        measured = device.measured_matmul_flops_per_s.get("bf16")  # the same units at the same rate
    k_loop = coefficient("matmul_k_loop")
    best = 1 + k_loop / 5120  # the best shapes have K of some thousands
    if dtype == "fp32":
        power = 1.0 if device.measured_matmul_flops_per_s else min(clock_share(device), 1.0)
        return device.peak("fp32") * coefficient("matmul_ceiling_vector") * power
    best *= sustained(device)
    if measured is not None:
        return measured * best
    like = _like(device)
    nearest = (dtype, "fp8", "bf16") if dtype in ("fp8", "fp4") else (dtype, "bf16")
    dtypes = [d for d in nearest if d in like.measured_matmul_flops_per_s]
    if dtypes:
        share = like.measured_matmul_flops_per_s[dtypes[0]] / like.peak(dtypes[0])
    else:
        share = coefficient(f"matmul_ceiling_{_maker(device)}")
    return device.peak(dtype) * share * best


# The same silicon under another name or limit: what was measured on one holds for the other, but for its power.
_SILICON = {"a800": "a100-80g-sxm", "h100": "h100-sxm", "h800": "h100-sxm"}


def _like(device: Accelerator) -> Accelerator:
    """``device`` where its products were measured, or else a part with the same silicon; itself where there is none."""
    if device.measured_matmul_flops_per_s:
        return device
    return accelerator(_SILICON.get(device.name.split("-")[0], device.name))


# Watts per dense 16-bit TFLOP/s of the parts whose long runs the shares were taken from: A100, H100, GB200 (SXM).
_REFERENCE_WATTS = {"ampere": 400 / 312, "hopper": 700 / 989.4, "blackwell": 1200 / 2500}


def sustained(device: Accelerator) -> float:
    """What a long run keeps of the best product of its generation, at most 1.

    The best product of a device that someone measured was measured at its own power limit.
    """
    share = coefficient(f"matmul_sustained_{generation(device)}")
    return share if device.measured_matmul_flops_per_s else min(share * clock_share(device), 1.0)


def clock_share(device: Accelerator) -> float:
    """The clock that the power limit allows, over that of the generation's best known part."""
    if not device.tdp_watts or _maker(device) != "nvidia":
        return 1.0
    watts = device.tdp_watts / (device.peak(product_dtype(device, "bf16")) / 1e12)
    static = coefficient("power_static")
    dynamic = max(watts / _REFERENCE_WATTS[generation(device)] - static, 0.05) / (1 - static)
    return float(dynamic ** coefficient("power_exponent"))


def _maker(device: Accelerator) -> str:
    return "amd" if device.vendor.lower() == "amd" else "nvidia"


def product_dtype(device: Accelerator, precision: str) -> str:
    """The dtype whose peak bounds products in ``precision``: fp8 for mxfp8; the next wider one the device has.

    Raises BadInput where the catalogue has none.
    """
    wanted = {"mxfp8": "fp8", "nvfp4": "fp4"}.get(precision, precision)
    wider = {"fp4": ("fp4", "fp8", "bf16", "fp16"), "fp8": ("fp8", "bf16", "fp16"), "bf16": ("bf16", "fp16", "fp32"),
             "fp16": ("fp16", "fp32")}  # fmt: skip
    found = next((d for d in (*wider.get(wanted, (wanted,)), "fp32") if d in device.peak_flops_per_s), None)
    if found is None:
        device.peak("fp32")  # says what there is
    return found or wanted


@cache
def rates(device: Accelerator, attention: str = "fused") -> Rates:
    """What ``device`` reaches, with ``attention`` flash1, flash2 or fused (the newest kernel of its generation)."""
    born = generation(device)
    if attention == "flash1" and born != "ampere":
        forward, backward = coefficient("flash1_forward_hopper"), coefficient("flash1_backward_hopper")
    elif attention == "flash1":
        forward, backward = coefficient("flash1_forward"), coefficient("flash1_backward")
    elif born == "ampere":
        forward, backward = coefficient("flash2_forward_ampere"), coefficient("flash2_backward_ampere")
    elif attention == "flash2" and born == "hopper":
        forward, backward = coefficient("flash2_forward_hopper"), coefficient("flash2_backward_hopper")
    else:
        forward, backward = coefficient(f"fused_forward_{born}"), coefficient(f"fused_backward_{born}")
    half = device.peak(product_dtype(device, "bf16")) * min(clock_share(device), 1.0)
    dtypes = {
        d: _ceiling(device, d) for d in device.peak_flops_per_s if d in ("fp32", "tf32", "fp16", "bf16", "fp8", "fp4")
    }
    return Rates(
        device, dtypes, forward * half, backward * half,
        device.memory_bytes_per_s * coefficient("memory_fraction"),
        device.sm_count or _UNITS,
        coefficient("kernel_gap_seconds"),
    )  # fmt: skip


def _tiles() -> tuple[tuple[int, int, float], ...]:
    return (
        (256, 128, 1.0),
        (128, 256, 1.0),
        (128, 128, coefficient("matmul_small_tile_128x128")),
        (128, 64, coefficient("matmul_small_tile_128x64")),
        (64, 128, coefficient("matmul_small_tile_128x64")),
        (64, 64, coefficient("matmul_small_tile_64x64")),
    )


def matmul_seconds(
    rates: Rates,
    dtype: str,
    M: Count,
    N: Count,
    K: Count,
    groups: Count = 1,
    out_bytes: float = 2.0,
    several: bool = False,
) -> Seconds:
    """Seconds of ``groups`` products (M, K) @ (K, N), one kernel or ``several``: the quickest of the library's tiles.

    Tiles run in waves over the device's units; where they do not fill one wave, K is split. ``out_bytes`` are those
    moved per element of the result (8 to add into an fp32 one). Never less than the bytes take.
    """
    k_loop = coefficient("matmul_k_loop")
    ceiling = rates.ceilings[dtype]
    in_bytes = {"fp32": 4, "tf32": 4, "fp8": 1, "fp4": 0.5}.get(dtype, 2)
    # a library runs a group's products on so many streams at once
    batches = np.ceil(groups / coefficient("matmul_streams")) if several else 1
    moved = groups * ((M * K + K * N) * in_bytes + M * N * out_bytes)
    groups = groups / batches
    best: Any = np.inf
    for tm, tn, relative in _tiles():
        tiles = groups * np.ceil(M / tm) * np.ceil(N / tn)
        tile_seconds = 2.0 * tm * tn * rates.units / (ceiling * relative)
        for split in (1, 2, 4, 8):
            waves = np.ceil(tiles * split / rates.units)
            best = np.minimum(best, waves * tile_seconds * (K / split + k_loop * (1 if split == 1 else 2)))
    return np.maximum(best * batches, moved / rates.bytes_per_s) + rates.gap_seconds


def attention_seconds(rates: Rates, flops: Count, S: Count, head: float, backward: bool = False) -> Seconds:
    """Seconds of a fused attention kernel that does ``flops`` over ``S`` keys with heads of ``head``."""
    ramp, wide = coefficient("attention_ramp_tokens"), coefficient("attention_ramp_head")
    share = S / (S + ramp) * (head / (head + wide)) * ((128 + wide) / 128)
    rate = rates.attention_backward if backward else rates.attention_forward
    return flops / (rate * np.minimum(share, 1.0)) + rates.gap_seconds


def stream_seconds(rates: Rates, n_bytes: Count, kernels: Count = 1) -> Seconds:
    """Seconds of ``kernels`` elementwise or reducing kernels that move ``n_bytes`` together."""
    return n_bytes / rates.bytes_per_s + kernels * rates.gap_seconds


def slowest_of(devices: Count) -> Any:
    """Seconds of the slowest of so many devices over those of the slowest of the eight that rates were read on.

    Chips of one name differ in the clock they hold at one power, and all wait for the slowest: of n drawn from a normal
    distribution it lies about √(2 ln n) deviations out.
    """
    spread = coefficient("clock_spread")
    return (1 + spread * np.sqrt(2 * np.log(devices))) / (1 + spread * np.sqrt(2 * np.log(8)))
