"""The page of ``bursar run``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bursar.report.text import line, note, table
from bursar.run import Run
from bursar.units import format_count, format_rate, format_seconds, format_share, format_usd


def render(run: Run, *, explain: bool = False) -> Iterator[Any]:
    """The parts of the equation, the solved one marked."""
    rows = [
        ("FLOPs", "flops", f"{run.flops:.3g}"),
        ("parameters", "parameters", "n/a" if run.parameters is None else format_count(run.parameters)),
        ("tokens", "tokens", "n/a" if run.tokens is None else format_count(run.tokens)),
        ("accelerators", "gpus", f"{run.gpus}" + (f" × {run.accelerator}" if run.accelerator else "")),
        ("MFU", "mfu", format_share(run.mfu)),
        ("time", "seconds", format_seconds(run.seconds)),
        ("GPU-hours", "", f"{run.gpu_hours:,.0f}"),
        ("cost", "usd", "n/a (no price: --usd-per-gpu-hour)" if run.usd is None else format_usd(run.usd)),
        ("energy", "", "n/a (no TDP is known)" if run.kwh is None else f"{run.kwh:,.0f} kWh"),
    ]
    marked = [(name, value, "← solved" if key == run.solved else "") for name, key, value in rows]
    yield table("The run", ("", "", ""), marked)
    if explain:
        yield line("Where the figures come from", style="bold")
        yield note(
            f"time = FLOPs / (n · peak · MFU) = {run.flops:.4g} / ({run.gpus} · "
            f"{format_rate(run.peak_flops_per_s, 'FLOP')} · {run.mfu:.4g}) = {run.seconds:.4g} s"
        )
    yield line("Assumptions", style="bold")
    for text in run.assumptions:
        yield note(text)
