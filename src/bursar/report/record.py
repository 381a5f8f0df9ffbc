"""The JSON of the contract, as typed records. ``SCHEMA_VERSION`` rises when a field changes its meaning."""

from __future__ import annotations

from typing import Any

import msgspec

from bursar.ledger import Ledger
from bursar.modules import shares
from bursar.report.gradients import Layer, layers
from bursar.roofline import Forecast
from bursar.workspaces import workspaces

SCHEMA_VERSION = 1


class UncountedOp(msgspec.Struct):
    """An op without a rule."""

    op: str
    calls: int
    bytes: int


class FlopsRecord(msgspec.Struct):
    """FLOPs of one step, for the whole job."""

    model: int
    hardware: int
    forward: int
    backward: int
    recompute: int
    optimizer: int
    by_kind: dict[str, int]
    by_dtype: dict[str, int]
    total: int
    six_p_tokens: int
    attention: int
    attention_full_square: int
    uncounted: list[UncountedOp]


class ModuleRecord(msgspec.Struct):
    """One module's share, or each of ``copies`` alike whose first number rises by one."""

    module: str
    copies: int
    flops: int
    bytes_moved: int
    bytes_at_peak: int
    roofline_seconds: float | None


class StepRecord(msgspec.Struct, kw_only=True):
    """What ``bursar step --json`` prints."""

    schema_version: int = SCHEMA_VERSION
    model: dict[str, Any]
    step: dict[str, int]
    flops: FlopsRecord
    bytes_moved: dict[str, Any]
    memory: dict[str, Any]
    collectives: list[dict[str, Any]]
    time: dict[str, Any] | None
    fits: bool | None
    hardware: dict[str, Any] | None
    modules: list[ModuleRecord]  # their figures add up to the step's
    gradients: list[Layer] | msgspec.UnsetType = msgspec.UNSET
    assumptions: list[str]
    versions: dict[str, str]


def step_record(
    ledger: Ledger, forecast: Forecast | None = None, *, on: str | None = None, gradients: bool = False
) -> StepRecord:
    """The record of one step; ``forecast`` adds time, fits and hardware."""
    flops, memory = ledger.flops, ledger.memory
    return StepRecord(
        model={
            "name": ledger.model.name,
            "parameters": ledger.model.parameters,
            "trainable_parameters": ledger.model.trainable_parameters,
        },
        step={
            "samples": ledger.step.samples,
            "tokens": ledger.step.tokens,
            "micro_batches": ledger.step.micro_batches,
        },
        flops=FlopsRecord(
            model=flops.model,
            hardware=flops.hardware,
            forward=flops.forward,
            backward=flops.backward,
            recompute=flops.recompute,
            optimizer=flops.optimizer,
            by_kind=dict(flops.by_kind),
            by_dtype=dict(flops.by_dtype),
            total=flops.total,
            six_p_tokens=flops.six_p_tokens,
            attention=flops.attention,
            attention_full_square=flops.attention_full_square,
            uncounted=[UncountedOp(u.op, u.calls, u.bytes) for u in flops.uncounted],
        ),
        bytes_moved={"total": sum(ledger.bytes_moved.values()), "by_kind": dict(ledger.bytes_moved)},
        memory={
            "peak_bytes": memory.peak_bytes,
            "allocated_bytes": memory.allocated_bytes,
            "reserved_bytes": memory.reserved_bytes,
            "workspaces": [
                {"name": w.name, "bytes": w.n_bytes, "allocated": w.allocated, "source": w.source}
                for w in (workspaces(ledger, forecast.cluster) if forecast else ())
            ],
            "saved_activation_bytes": memory.saved_activations,
            "at_peak": dict(memory.at_peak),
            "between_steps": dict(memory.between_steps),
            "textbook": {
                "parameters": memory.textbook.parameters,
                "activations": memory.textbook.activations,
                "gradients": memory.textbook.gradients,
                "optimizer_state": memory.textbook.optimizer_state,
                "total": memory.textbook.total,
            },
        },
        collectives=[
            {"op": c.op, "group": c.group, "ranks": c.ranks, "calls": c.calls, "bytes": c.bytes}
            for c in (forecast.collectives if forecast else ())
        ],
        time=None
        if forecast is None
        else {
            "seconds": forecast.seconds,
            "roofline_seconds": forecast.roofline_seconds,
            "lower_seconds": forecast.lower_seconds,
            "upper_seconds": forecast.upper_seconds,
            "mfu": forecast.mfu,
            "mfu_full_square": forecast.mfu_full_square,
            "hfu": forecast.hfu,
            "bound_by": dict(forecast.bound_by),
            "basis": forecast.basis,
        },
        fits=None if forecast is None else forecast.fits,
        hardware=None
        if forecast is None
        else {"name": forecast.cluster.accelerator.name, "count": forecast.cluster.count},
        modules=[ModuleRecord(*share) for share in shares(ledger, forecast.cluster.accelerator if forecast else None)],
        gradients=layers(ledger) if gradients else msgspec.UNSET,
        assumptions=[*ledger.assumptions, *(forecast.assumptions if forecast else ())],
        versions=dict(ledger.versions),
    )
