"""Record and page of ``bursar train``: the forecast and the measurement, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from bursar.report.record import SCHEMA_VERSION
from bursar.report.text import line, note, table
from bursar.units import format_bytes, format_count, format_flops, format_seconds, format_share

_SMALL = 10**5  # below this a count is printed whole


class Figures(msgspec.Struct):
    """One step: FLOPs of the whole job, peak of one rank. None is what was not, or cannot be, known."""

    flops: int | None = None  # model FLOPs
    hardware_flops: int | None = None
    peak_bytes: int | None = None
    seconds: float | None = None


class TrainRecord(msgspec.Struct, kw_only=True):
    """What ``bursar train --json`` prints. ``forecast`` and ``measured`` are of one step; the rest of the run."""

    schema_version: int = SCHEMA_VERSION
    model: str
    parameters: int
    device: str
    ranks: int
    samples_per_step: int
    tokens_per_step: int
    steps: int = 0  # done, those before a resume included
    tokens: int = 0  # seen in them
    first_loss: float | None = None
    final_loss: float | None = None
    checkpoint: str | None = None
    out: str | None = None
    run_seconds: float | None = None  # from the first step of this call to the last
    tokens_per_second: float | None = None
    mfu: float | None = None  # where the device's peak is known
    mfu_full_square: float | None = None
    forecast: Figures
    measured: Figures
    assumptions: list[str]


def render(record: TrainRecord) -> Iterator[Any]:
    """Headline, the two columns, remarks."""
    r, dry = record, record.out is None
    yield line(
        f"{r.model}: {format_count(r.parameters)} parameters, {r.ranks} × {r.device}, {r.samples_per_step} samples = "
        f"{r.tokens_per_step} tokens a step",
        style="bold",
    )
    if not dry:
        yield note(
            f"{r.steps} steps, {format_count(r.tokens)} tokens; loss {_loss(r.first_loss)} → {_loss(r.final_loss)}"
        )
        yield note(f"checkpoint {r.checkpoint}")
    pairs = (
        ("model FLOPs", r.forecast.flops, r.measured.flops, _flops),
        ("hardware FLOPs", r.forecast.hardware_flops, r.measured.hardware_flops, _flops),
        ("peak memory, one rank", r.forecast.peak_bytes, r.measured.peak_bytes, _bytes),
        ("seconds", r.forecast.seconds, r.measured.seconds, format_seconds),
    )
    columns = ("", "forecast") if dry else ("", "forecast", "measured", "measured / forecast")
    rows = [
        (name, _known(ahead, show), _known(behind, show), f"{behind / ahead:.4f}" if ahead and behind else "")
        for name, ahead, behind, show in pairs
    ]
    yield table("One step", columns, [row[: len(columns)] for row in rows])
    if r.tokens_per_second is not None:
        yield note(f"{format_count(r.tokens_per_second)} tokens/s; the run took {format_seconds(r.run_seconds)}")
    if r.mfu is not None:
        yield note(f"MFU {format_share(r.mfu)}; by the full-square convention {format_share(r.mfu_full_square)}")
    elif not dry:
        yield note("MFU: not known, for the peak of this device is not in the catalogue")
    yield line("Assumptions", style="bold")
    for text in r.assumptions:
        yield note(text)


def _known(value: Any, show: Any) -> str:
    return "not known" if value is None else str(show(value))


def _loss(loss: float | None) -> str:
    return "none" if loss is None else f"{loss:.4f}"


def _flops(n: int) -> str:
    return f"{n} FLOP" if n < _SMALL else format_flops(n)


def _bytes(n: int) -> str:
    return f"{n} B" if n < _SMALL else format_bytes(n)
