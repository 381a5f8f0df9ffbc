"""The pages and records of ``bursar optimizers``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bursar.errors import BadInput, MissingExtra
from bursar.optimizers import ClassBytes, Compared, Cost, Optimizer, Race, family_tree
from bursar.report.text import line, note, sparkline, table
from bursar.units import format_bytes, format_flops

SYMBOLS = (
    "θ parameter, g gradient, η learning rate, λ weight decay, μ momentum, β ρ decay rates, ε against division by 0"
)


def record(row: Optimizer, cost: Cost | None) -> dict[str, Any]:
    """A row with its costs; null where torch or its library is not installed."""
    made = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
    return {**made, "settings": dict(row.settings), "per_parameter": None if cost is None else dataclasses.asdict(cost)}


def list_page(costs: Mapping[str, Cost | None]) -> Iterator[Any]:
    """The family tree with what each costs per parameter; the rules and sources below."""
    tree = list(family_tree())
    yield table(
        "Optimizers: each below the one whose rule it changes; per parameter",
        ("", "state, fp32", "bf16", "FLOPs", "bytes moved"),
        [(branch + row.name, *_cells(costs[row.name])) for branch, row in tree],
    )
    yield note(
        "State: bytes in the real state_dict after a step on a 256 × 256 matrix with fp32 or bf16 parameters, "
        "host counters left out. FLOPs and bytes moved: a traced fp32 step on it (multi-tensor kernels)."
    )
    for _, row in tree:
        if row.note:
            yield note(f"{row.name}: {row.note}.")
    if any(cost is None for cost in costs.values()):
        yield note("–: not installed here, so not measured (bursar[torch], bursar[optim]).")
    yield line("")
    yield line("Rules", style="bold")
    yield note(SYMBOLS)
    for _, row in tree:
        yield line("")
        yield line(row.name + (f" = {row.builds_on}, with {row.adds}" if row.builds_on else ""))
        yield from (note(text) for text in row.rule)
        yield note(row.source)


def one_page(row: Optimizer, cost: Cost | None) -> Iterator[Any]:
    """One optimizer: rule, source, state tensors, costs."""
    yield line(row.name + (f" = {row.builds_on}, with {row.adds}" if row.builds_on else ""), style="bold")
    yield from (note(text) for text in row.rule)
    yield note(SYMBOLS)
    yield line("")
    settings = ", ".join(f"{k} = {v}" for k, v in row.settings.items())
    rows = [("source", row.source), ("made by", f"{row.make}({settings})")]
    if row.extra:
        rows.append(("needs", f"bursar[{row.extra}]"))
    if cost is not None:
        rows += [(f"state {name}", shape) for name, shape in cost.state.items()] or [("state", "none")]
        names = ("state bytes per parameter, fp32", "the same, bf16 parameters", "FLOPs per parameter",
                 "bytes moved per parameter")  # fmt: skip
        rows += list(zip(names, _cells(cost), strict=True))
    yield table("", ("", ""), rows, left=2)
    if cost is None:
        yield note("not installed here, so not measured")
    else:
        yield note("Measured on a 256 × 256 matrix; state shapes are of that matrix.")
    if row.note:
        yield note(f"{row.name}: {row.note}.")


def _cells(cost: Cost | None) -> tuple[str, str, str, str]:
    if cost is None:
        return ("–",) * 4
    return tuple(f"{x:.4g}" for x in (cost.state_bytes, cost.state_bytes_bf16, cost.flops, cost.bytes_moved))  # type: ignore[return-value]  # four of them


def bytes_page(rows: Sequence[ClassBytes]) -> Iterator[Any]:
    """What a training state takes under each precision, class by class."""
    yield table(
        "AdamW's training state in bytes per parameter, counted on real tensors",
        ("", "parameters", "gradients", "fp32 master", "states", "total"),
        [
            (r.precision, *(f"{x:.4g}" for x in (r.parameters, r.gradients, r.master, r.optimizer_state, r.total)))
            for r in rows
        ],
    )
    yield note("A 1024 × 1024 matrix, its real gradient and state_dict. Activations come on top, and what an update "
               "makes for itself: with fp32 states over bf16 parameters, an fp32 copy of what it updates.")  # fmt: skip
    yield note("torch.optim.AdamW keeps its states in the parameters' dtype; fp32 states need an fp32 copy to step on.")


def compare_page(model: str, found: Sequence[Compared], races: Sequence[Race], task: str) -> Iterator[Any]:
    """Memory and work of one model's step under each optimizer, and their losses on one small task."""
    yield table(
        f"One fp32 step of {model} under each (traced)",
        ("", "state", "peak", "optimizer FLOPs"),
        [(c.name, format_bytes(c.state_bytes), format_bytes(c.peak_bytes), format_flops(c.flops)) for c in found],
    )
    low = min(min(r.losses) for r in races)
    high = max(r.losses[0] for r in races)
    order = sorted(races, key=lambda r: r.losses[-1])
    steps = len(races[0].losses) - 1
    yield table(
        f"Measured: the loss over {steps} steps on one small task",
        ("", "learning rate", "loss after", f"{high:.2g} down to {low:.2g}, logarithmic"),
        [
            (r.name, f"{r.lr:g}", f"{r.losses[-1]:.4f}", sparkline(r.losses, low, high, width=32, log=True))
            for r in order
        ],
    )
    yield note(f"The task: {task}; full batch, fp32, CPU, seed 0, no weight decay.")
    yield note("The learning rate is the best of five tried for each: its usual one times 1, 3, 10, 30, 100. "
               "A race on one small task ranks them for that task.")  # fmt: skip


def compare_record(found: Sequence[Compared], races: Sequence[Race]) -> dict[str, Any]:
    """The same for programs."""
    return {"memory": [dataclasses.asdict(c) for c in found], "race": [dataclasses.asdict(r) for r in races]}


def plot(races: Sequence[Race], task: str, path: Path) -> None:
    """Draw the losses into ``path`` (.png or .svg). Raises MissingExtra without matplotlib."""
    if path.suffix not in (".png", ".svg"):
        raise BadInput(f"--plot {path.name}: bursar draws .png and .svg")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("plot", "drawing a plot takes matplotlib") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for r in sorted(races, key=lambda r: r.losses[-1]):
        axes.semilogy(r.losses, label=f"{r.name}, η = {r.lr:g}")
    axes.set(xlabel="step", ylabel="loss", title="Loss on one small task, best of five learning rates each")
    axes.legend(fontsize="small", ncols=2)
    figure.text(0.01, 0.0, task, fontsize=6, va="bottom")
    figure.savefig(path, dpi=150)
