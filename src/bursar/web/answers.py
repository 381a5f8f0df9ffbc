"""From a set-up to its records, by calling the lower floors. No arithmetic here.

A `Figure` is one number of the page with all that may be asked about it: its 80 % interval, its formula, what went in
and where that is from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bursar.architecture import preset
from bursar.hardware import Cluster, accelerator
from bursar.run import solve
from bursar.web.state import Setup


@dataclass(frozen=True, slots=True)
class Input:
    """What went into a figure, and where it is from."""

    name: str
    value: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number of the page. ``kind`` says how it is written: a filter of `pages`."""

    key: str
    label: str
    kind: str
    value: float | None
    low: float | None = None  # of the 80 % interval
    high: float | None = None
    formula: str = ""
    inputs: tuple[Input, ...] = ()
    source: str = ""
    missing: str = ""  # why there is none


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a whole: of a rank's memory, of a step's time."""

    name: str
    value: float
    share: float
    says: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """A layout of the search, with its figures and the set-up that takes it."""

    setup: Setup
    words: tuple[str, ...]
    figures: Mapping[str, Figure]


@dataclass(frozen=True, slots=True)
class Lever:
    """One change to the set-up, and what it does."""

    name: str
    says: str
    setup: Setup | None
    figures: Mapping[str, Figure]


@dataclass(frozen=True, slots=True)
class Answered:
    """All the page says of one set-up."""

    setup: Setup
    title: str
    fits: bool | None
    figures: Mapping[str, Figure]
    memory: tuple[Part, ...] = ()
    capacity_bytes: float = 0
    time: tuple[Part, ...] = ()
    choices: tuple[Choice, ...] = ()
    rejected: tuple[tuple[str, int], ...] = ()
    searched: int = 0
    levers: tuple[Lever, ...] = ()
    assumptions: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def answer(setup: Setup) -> Answered:
    """Everything the page says of ``setup``. Raises BursarError for what cannot be."""
    shape = preset(setup.model)
    where = Cluster(accelerator(setup.gpu), setup.gpus)
    run = solve(parameters=shape.parameters(), tokens=setup.tokens, on=where, usd_per_gpu_hour=setup.price)
    figures = (
        Figure("time", "Time", "seconds", run.seconds, run.seconds, run.seconds, "6 · P · tokens / (n · peak · MFU)",
               (Input("parameters", str(run.parameters), shape.source),)),
        Figure("cost", "Cost", "usd", run.usd),
        Figure("mfu", "MFU", "share", run.mfu),
    )  # fmt: skip
    return Answered(setup, "", None, {f.key: f for f in figures}, assumptions=run.assumptions)


def record(answered: Answered) -> dict[str, Any]:
    """The JSON of one set-up's answer."""
    return {"fits": answered.fits, "figures": {k: f.value for k, f in answered.figures.items()}}


def verdict(answered: Answered) -> str:
    """Fits or not, in a sentence."""
    return "Fits." if answered.fits else "Does not fit."


def ratio(a: Figure, b: Figure) -> float | None:
    """How many times ``a`` is ``b``."""
    return b.value / a.value if a.value and b.value is not None else None
