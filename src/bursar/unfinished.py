"""A measurement that came to no end: what was measured until then, beside the forecast. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bursar.ledger import Ledger
from bursar.reconcile import PEAK_TOLERANCE, SLACK_BYTES, Line
from bursar.units import format_bytes

KINDS = ("raised", "memory", "loss", "stopped")


@dataclass(frozen=True)
class Unfinished:
    """Why a measured step ended early, and the figures there were."""

    kind: str  # of KINDS
    reason: str  # one line
    where: str  # the user's own file:line; empty where it is not in their code
    steps: int  # finished before
    device: str  # "cpu" or "cuda"
    figures: Mapping[str, int]  # model_flops, hardware_flops, peak_bytes: those that were measured


def lines(ledger: Ledger, unfinished: Unfinished) -> tuple[Line, ...]:
    """Forecast and measurement of what was measured, as `reconcile` writes them."""
    found = unfinished.figures
    forecast = {
        "model_flops": ("model FLOPs", "FLOP", ledger.flops.model),
        "hardware_flops": ("hardware FLOPs", "FLOP", ledger.flops.hardware),
        "peak_bytes": ("peak memory", "B", ledger.memory.peak_bytes),
    }
    written = []
    for name, (what, unit, predicted) in forecast.items():
        if name in found:
            slack = max(PEAK_TOLERANCE[unfinished.device], SLACK_BYTES / max(found[name], 1)) if unit == "B" else 0.0
            written.append(Line(what, unit, predicted, found[name], slack))
    return tuple(written)


def remedy(ledger: Ledger, unfinished: Unfinished, free_bytes: int) -> str:
    """What to do next; of a step that ran out of memory, the batch that would have fitted in ``free_bytes``."""
    if unfinished.kind == "memory":
        peak, stands = ledger.memory.peak_bytes, sum(ledger.memory.between_steps.values())
        batch = ledger.step.samples // max(1, ledger.step.micro_batches * ledger.replicas)
        least = f"the forecast peak is {format_bytes(peak)}, and {format_bytes(free_bytes)} were free"
        if peak <= free_bytes or peak <= stands:
            return f"{least}: it took more than was forecast; free memory and measure again"
        fits = int(batch * max(0, free_bytes - stands) / (peak - stands))
        return f"{least}; " + (f"a batch of {fits} would fit" if fits else "no batch would fit; take a smaller model")
    if unfinished.kind == "loss":
        return (
            "the FLOPs and bytes below stand; start from other weights, or a lower learning rate, to measure its time"
        )
    if unfinished.kind == "raised":
        return "the forecast stands; mend the model's code and measure again"
    return "measure again"
