"""The optimizers by name: rule, source, what each builds on. Read from `catalog/optimizers.toml`; nothing here is run.

What an optimizer keeps and costs is not written down anywhere: `workload.optimizers` reads it off a real step.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from bursar.errors import UnknownName


@dataclass(frozen=True, slots=True)
class Optimizer:
    """One optimizer: how to make it and where its rule comes from."""

    name: str
    make: str  # the dotted name of its class
    rule: tuple[str, ...]  # one update, line by line, in the catalogue's symbols
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    extra: str = ""  # what must be installed for it
    builds_on: str = ""  # the optimizer whose rule it changes; empty for the root
    adds: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Cost:
    """What an optimizer keeps and does per parameter of a square matrix."""

    state: Mapping[str, str]  # the state tensors as found: name -> shape and dtype
    state_bytes: float  # fp32 parameters
    state_bytes_bf16: float  # bf16 parameters
    flops: float  # per update, matmuls included
    bytes_moved: float


@dataclass(frozen=True, slots=True)
class ClassBytes:
    """A training state in bytes per parameter."""

    precision: str
    parameters: float
    gradients: float
    master: float
    optimizer_state: float

    @property
    def total(self) -> float:
        """All four."""
        return self.parameters + self.gradients + self.master + self.optimizer_state


@dataclass(frozen=True, slots=True)
class Compared:
    """A model's step under one optimizer."""

    name: str
    state_bytes: int
    peak_bytes: int
    flops: int


@dataclass(frozen=True, slots=True)
class Race:
    """The losses of one optimizer, before each step and after the last."""

    name: str
    lr: float
    losses: tuple[float, ...]


def _read() -> dict[str, Optimizer]:
    rows = tomllib.loads(files("bursar").joinpath("catalog/optimizers.toml").read_text(encoding="utf-8"))
    return {name: Optimizer(name, **{**row, "rule": tuple(row["rule"])}) for name, row in rows.items()}


OPTIMIZERS: Mapping[str, Optimizer] = _read()


def optimizer(name: str) -> Optimizer:
    """The row of that name. Raises UnknownName naming the nearest known."""
    if name not in OPTIMIZERS:
        raise UnknownName("optimizer", name, OPTIMIZERS, "Add a row to catalog/optimizers.toml.")
    return OPTIMIZERS[name]


def family_tree() -> Iterator[tuple[str, Optimizer]]:
    """Every optimizer after the one it builds on, with the branches to draw before its name.

    >>> print("\\n".join(branch + row.name for branch, row in list(family_tree())[:4]))
    sgd
    ├─ momentum
    │  ├─ nesterov
    │  │  └─ muon
    """

    def below(parent: str, indent: str) -> Iterator[tuple[str, Optimizer]]:
        children = [row for row in OPTIMIZERS.values() if row.builds_on == parent]
        for row in children:
            last = row is children[-1]
            branch, under = ("└─ ", "   ") if last else ("├─ ", "│  ")
            yield indent + (branch if parent else ""), row
            yield from below(row.name, indent + under if parent else "")

    yield from below("", "")
