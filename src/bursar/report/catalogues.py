"""The pages and records of the catalogues: accelerators and models."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from bursar.architecture import Network, Transformer, preset_keys
from bursar.hardware import Accelerator
from bursar.report.text import line, table
from bursar.units import format_bytes, format_count, format_rate

DTYPES = ("fp32", "tf32", "bf16", "fp8")


def accelerator_record(device: Accelerator) -> dict[str, Any]:
    """Every field of a row, its sources with it."""
    record = {f.name: getattr(device, f.name) for f in dataclasses.fields(device)}
    record["usable_bytes"] = device.usable_bytes
    return {k: dict(v) if hasattr(v, "items") else v for k, v in record.items()}


def accelerators_page(devices: Sequence[Accelerator]) -> Iterator[Any]:
    """One line per accelerator: dense peaks, memory, bandwidth."""
    yield table(
        "Accelerators: dense peaks in TFLOP/s, accumulating in fp32",
        ("name", *DTYPES, "memory", "TB/s", "ridge"),
        [
            (
                d.name,
                *(f"{d.peak_flops_per_s[t] / 1e12:.5g}" if t in d.peak_flops_per_s else "–" for t in DTYPES),
                format_bytes(d.memory_bytes),
                f"{d.memory_bytes_per_s / 1e12:.4g}",
                f"{d.ridge('bf16'):.1f}" if "bf16" in d.peak_flops_per_s else "–",
            )
            for d in devices
        ],
    )
    yield line("  TB/s: memory bandwidth. ridge: FLOP per byte from which bf16 is bound by compute.")
    yield line("  bursar hardware NAME shows each figure's source.")


def accelerator_page(device: Accelerator) -> Iterator[Any]:
    """One accelerator, a line and a source per figure."""
    rows = []
    for field in dataclasses.fields(device):
        value = getattr(device, field.name)
        if field.name in ("name", "title", "vendor", "year", "sources") or value in (None, (), {}):
            continue
        source = device.sources.get(field.name, "")
        if hasattr(value, "items"):
            figures = [(f"{field.name} {k}", _figure(field.name, v)) for k, v in value.items()]
            rows += [(name, figure, "″" if i else source) for i, (name, figure) in enumerate(figures)]
        else:
            rows.append((field.name, _figure(field.name, value), source))
    yield table(f"{device.name}: {device.title} ({device.vendor}, {device.year})", ("", "", "source"), rows, left=3)


def _figure(name: str, value: Any) -> str:
    """A figure of the catalogue with its unit."""
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return ", ".join(value)
    if name.endswith("flops_per_s"):
        return format_rate(value, "FLOP")
    if name.endswith("bytes_per_s"):
        return format_rate(value, "B")
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def model_record(model: Transformer | Network) -> dict[str, Any]:
    """The shape, with the exact number of parameters."""
    record = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    if isinstance(model, Network):
        record["sizes"] = dict(model.sizes)
    else:
        record["twelve_d2_l"] = model.twelve_d2_l()[0]
    return {**record, "parameters": model.parameters()}


def models_page(models: Sequence[Transformer | Network]) -> Iterator[Any]:
    """One line per model."""
    rows = []
    for m in models:
        if isinstance(m, Transformer):
            shape = f"L={m.n_layers} d={m.d_model} h={m.n_heads} kv={m.n_kv_heads} F={m.d_ff} V={m.vocab_size}"
        else:
            shape = " ".join(f"{k}={v}" for k, v in m.sizes.items())
        rows.append((m.name, shape, format_count(m.parameters())))
    yield table("Models", ("name", "shape", "parameters"), rows, left=2)
    yield line("  Sizes may be changed: gpt2:L=2,d=256.")
    yield line("  Or give a config.json, file.py:callable, package.module:callable.")


def twelve(model: Transformer) -> str:
    """12·d²·L with its error against the exact counts."""
    rule, blocks = model.twelve_d2_l()
    return (
        f"12·d²·L = {format_count(rule)}: {rule / blocks - 1:+.1%} against the blocks' attention and MLP, "
        f"{rule / model.parameters() - 1:+.1%} against all {format_count(model.parameters())}"
    )


def model_page(model: Transformer | Network) -> Iterator[Any]:
    """One model: its sizes, its parameters by part, its source."""
    record = model_record(model)
    other = ("name", "source", "parameters", "sizes")
    rows = [(k, f"{v}") for k, v in record.items() if k not in other and v is not None]
    if isinstance(model, Network):
        rows += [(k, str(v)) for k, v in model.sizes.items()]
    yield table(model.name, ("", ""), rows)
    groups = model.parameter_groups() if isinstance(model, Transformer) else {}
    parts = [(k, f"{v:,}") for k, v in groups.items() if v]
    yield table("Parameters", ("", ""), [*parts, ("all", f"{model.parameters():,}")])
    if isinstance(model, Transformer):
        yield line(f"  {twelve(model)}")
    yield line(f"  {model.source}")
    yield line(f"  sizes that may be changed: {', '.join(preset_keys(model.name.split(':')[0]))}")
