"""The page of ``bursar run``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bursar.goodput import Goodput
from bursar.report.text import line, note, table
from bursar.run import Run
from bursar.scaling import Optimal
from bursar.units import format_count, format_rate, format_seconds, format_share, format_usd


def render(
    run: Run, goodput: Goodput | None = None, optimal: Optimal | None = None, *, explain: bool = False
) -> Iterator[Any]:
    """The parts of the equation, the solved one marked; with failures, and what the compute would best be spent on."""
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
    if run.steps is not None:
        steps = f"{run.steps:,} of {format_count(run.batch_tokens)} tokens"
        rows.insert(3, ("steps", "", f"{steps}, {format_seconds(run.seconds / run.steps)} each"))
    marked = [(name, value, "← solved" if key == run.solved else "") for name, key, value in rows]
    yield table("The run", ("", "", ""), marked)
    for threshold, reached in run.thresholds:
        if reached:
            yield line(f"Reaches {threshold.name}: {threshold.flops:.3g} FLOP, {threshold.status} ({threshold.source})")
    if goodput is not None:
        yield from _goodput(run, goodput)
    if optimal is not None:
        yield from _optimal(run, optimal)
    if explain:
        yield line("Where the figures come from", style="bold")
        yield note(
            f"time = FLOPs / (n · peak · MFU) = {run.flops:.4g} / ({run.gpus} · "
            f"{format_rate(run.peak_flops_per_s, 'FLOP')} · {run.mfu:.4g}) = {run.seconds:.4g} s"
        )
    yield line("Assumptions", style="bold")
    for text in (*run.assumptions, *(goodput.assumptions if goodput else ())):
        yield note(text)


def _goodput(run: Run, left: Goodput) -> Iterator[Any]:
    rows = [
        ("goodput", format_share(left.share), "of the wall time is kept work"),
        ("wall time", format_seconds(left.wall_seconds), f"{format_seconds(run.seconds)} without failures"),
        ("interruptions", f"{left.interruptions:,.0f}", f"one every {format_seconds(left.mtbf_seconds)}"
         if left.interruptions else "none"),
        ("checkpoint", format_seconds(left.checkpoint_seconds),
         f"after {format_seconds(left.interval_seconds)} of work"),
    ]  # fmt: skip
    if run.usd is not None:
        rows.append(("cost", format_usd(run.usd / left.share), ""))
    yield table("With failures (Young 1974, Daly 2006)", ("", "", ""), rows)


def _optimal(run: Run, best: Optimal) -> Iterator[Any]:
    rows = [
        ("table 3", format_count(best.parameters), format_count(best.tokens), f"{best.tokens_per_parameter:.1f}"),
        ("refit", format_count(best.refit_parameters), format_count(best.refit_tokens),
         f"{best.refit_tokens / best.refit_parameters:.1f}"),
    ]  # fmt: skip
    if run.parameters and run.tokens:
        ratio = f"{run.tokens / run.parameters:.1f}"
        rows.append(("this run", format_count(run.parameters), format_count(run.tokens), ratio))
    yield table(
        f"What {run.flops:.3g} FLOP are best spent on", ("", "parameters", "tokens", "tokens per parameter"), rows
    )
    yield note("Hoffmann et al. 2022, table 3; the refit of their third approach is Besiroglu et al. 2024's")
