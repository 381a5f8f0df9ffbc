"""What a step will cost, by tracing the very code that is to run; and the refusal of what will not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from bursar import hardware, ranks, roofline
from bursar.errors import NoAnswer, UnknownName
from bursar.ledger import Ledger, Step
from bursar.meter import memory
from bursar.trace import tracing
from bursar.units import format_bytes


@dataclasses.dataclass(frozen=True)
class Forecast:
    """The whole job's ledger, one rank's peak; priced where the device is in the catalogue."""

    ledger: Ledger
    peak_bytes: int
    priced: roofline.Forecast | None
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float | None:
        """Of one step; None where nobody knows the device's speed."""
        return self.priced.seconds if self.priced else None


def forecast(
    rehearse: Callable[[torch.device], nn.Module], done: Step, layout: str, device: torch.device
) -> Forecast:  # fmt: skip
    """``rehearse(fake)`` runs two steps of one rank on the fake device and returns the model; the second is kept.

    ``done`` is a whole job's step, ``layout`` how the ranks there are share it: ``single``, ``ddp`` or ``fsdp``.
    """
    with tracing(on="cpu" if device.type == "cpu" else None) as traced:
        module = rehearse(torch.device(device.type))
        units = [sum(p.nbytes for p in m.parameters()) for m in module.modules() if m is not module]
    ledger = dataclasses.replace(traced.ledger, step=done, replicas=ranks.count)
    notes = list(ledger.assumptions)
    peak = _peak(ledger, layout, max(units, default=0), notes)
    return Forecast(ledger, peak, _priced(ledger, device, notes), tuple(notes))


def _peak(ledger: Ledger, layout: str, unit_bytes: int, notes: list[str]) -> int:
    """One rank's; what sharding takes from it and DDP's averaging adds is reckoned, and ``notes`` says so."""
    if ranks.count > 1 and layout == "fsdp":
        alone = dataclasses.replace(ledger, replicas=1).memory
        states = sum(alone.at_peak[c] for c in ("parameters", "gradients", "optimizer_state"))
        notes.append(f"fsdp peak: an estimate, 1/{ranks.count} of the states and one gathered unit with its gradients")
        return alone.peak_bytes - states + states // ranks.count + 2 * unit_bytes
    if ranks.count > 1 and layout == "ddp" and ledger.step.micro_batches > 1:
        notes.append("ddp with accumulation holds the gradients twice: beside the buckets until they are averaged")
        return ledger.memory.peak_bytes + ledger.textbook.gradients
    return ledger.memory.peak_bytes


def _priced(ledger: Ledger, device: torch.device, notes: list[str]) -> roofline.Forecast | None:
    if device.type == "cpu":
        notes.append("seconds are not forecast: no peak and bandwidth are known for this CPU")
        return None
    try:
        row = hardware.by_driver_name(torch.cuda.get_device_name(device))
    except UnknownName as error:
        notes.append(f"seconds are not forecast: {error}")
        return None
    return roofline.forecast(ledger, hardware.Cluster(row, ranks.count))


def refuse_what_does_not_fit(ahead: Forecast, device: torch.device, remedy: str) -> None:
    """Raise NoAnswer with the remedy where the forecast peak is more than this machine has for its ranks."""
    need, has = ahead.peak_bytes * (1 if device.type == "cuda" else ranks.here), memory.there_are(device)
    if need > has:
        where = "free on this GPU" if device.type == "cuda" else "of memory here"
        raise NoAnswer(
            f"does not fit: the step needs {format_bytes(need)} and there are {format_bytes(has)} {where}; {remedy}"
        )
