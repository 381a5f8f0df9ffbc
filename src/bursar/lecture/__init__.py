"""The claims of the lecture notes, executed: the notes say, bursar computes, and the two decide the verdict.

What the notes say, and the correction, is a row of ``catalog/lecture.toml``. What bursar makes of it is one function
here, registered under the claim's id: it computes, and says under which conditions the statement was found to hold. No
function names a verdict; `verdict` reads it off those conditions, so a wrong rule anywhere in bursar turns a verdict.

Importing this package does not import torch; executing a chapter does.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, TypeVar

from bursar.errors import BadInput, MissingExtra
from bursar.report.lecture import Line

__all__ = [
    "CHAPTERS",
    "Claim",
    "Finding",
    "check",
    "claim",
    "close",
    "evaluate",
    "execute",
    "forget",
    "notes",
    "shared",
    "verdict",
]

CHAPTERS = (7, 8, 9, 10)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Claim:
    """What the notes say, and what is right: one row of ``catalog/lecture.toml``."""

    id: str
    claim: str
    notes: str
    correct: str
    given: Mapping[str, Any] = field(default_factory=dict)  # what the execution starts from
    verdict: str = ""  # only where no code can settle it, and then with the reason
    reason: str = ""

    @property
    def chapter(self) -> int:
        """The chapter of the notes: 7 to 10."""
        return int(self.id.split(".")[0])

    @property
    def values(self) -> tuple[float, ...]:
        """The numbers the notes state, in order.

        >>> notes()["7.14"].values, notes()["7.6"].values
        ((0.45, 0.55, 0.5), (8800000000000000.0,))
        """
        return tuple(float(n) for n in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e\d+)?", self.notes))

    @property
    def value(self) -> float:
        """The first number the notes state."""
        return self.values[0]


@dataclass(frozen=True, slots=True)
class Finding:
    """What bursar computed for a claim.

    ``holds`` says, condition by condition, whether the statement is true; ``follows``, whether what the notes draw from
    it is. ``numbers`` are the values behind ``computed``, unrounded.
    """

    computed: str
    holds: Mapping[str, bool]
    follows: Mapping[str, bool] = field(default_factory=dict)
    numbers: tuple[float, ...] = ()

    @property
    def verdict(self) -> str:
        """The word for it."""
        return verdict(tuple(self.holds.values()), tuple(self.follows.values()))


def verdict(holds: tuple[bool, ...], follows: tuple[bool, ...] = ()) -> str:
    """The verdict on a statement, from where it holds and whether what is drawn from it follows.

    >>> verdict((True,)), verdict((True, False)), verdict((True,), (False,)), verdict((False,))
    ('right', 'depends', 'misleading', 'wrong')
    """
    if not any(holds):
        return "wrong"
    if not all(holds):
        return "depends"
    return "right" if all(follows) else "misleading"


def close(computed: float, stated: float, tolerance: float = 0.01) -> bool:
    """Whether ``computed`` is what the notes state, within a share of it: what their rounding may hide, 1 %."""
    return math.isclose(computed, stated, rel_tol=tolerance)


# ---- the register

_FUNCTIONS: dict[str, Callable[[Claim], Finding]] = {}
_SHARED: list[Any] = []


def claim(id: str) -> Callable[[Callable[[Claim], Finding]], Callable[[Claim], Finding]]:
    """Register the decorated function as the execution of the claim ``id``. Raises ValueError for an id taken."""

    def register(function: Callable[[Claim], Finding]) -> Callable[[Claim], Finding]:
        if id in _FUNCTIONS:
            raise ValueError(f"claim {id} is executed by {_FUNCTIONS[id].__name__} already")
        _FUNCTIONS[id] = function
        return function

    return register


def shared(function: Callable[..., _T]) -> Callable[..., _T]:
    """Compute once per execution: several claims look at the same step, and the next execution traces it anew."""
    kept = functools.cache(function)
    _SHARED.append(kept)
    return kept


@functools.cache
def notes() -> Mapping[str, Claim]:
    """Every claim of the notes by id, in their order."""
    text = files("bursar").joinpath("catalog", "lecture.toml").read_text(encoding="utf-8")
    return {id: Claim(id, **row) for id, row in tomllib.loads(text).items()}


def check(chapter: int | None) -> None:
    """Raise BadInput for a chapter the notes do not have; None is all of them."""
    if chapter is not None and chapter not in CHAPTERS:
        known = ", ".join(str(n) for n in CHAPTERS)
        raise BadInput(f"no chapter {chapter} in the notes; give one of {known}, or none for all")


def execute(chapter: int | None = None) -> list[Line]:
    """The claims of ``chapter``, or of all four, executed in the notes' order. Raises BadInput as `check` does."""
    check(chapter)
    asked = CHAPTERS if chapter is None else (chapter,)
    forget()
    return [evaluate(row) for row in notes().values() if row.chapter in asked]


def forget() -> None:
    """Drop what claims computed together, so that the next one computes it anew."""
    for kept in _SHARED:
        kept.cache_clear()


def evaluate(row: Claim) -> Line:
    """One claim with what bursar makes of it; without a computed value where no code settles it or an extra lacks."""
    importlib.import_module(f"bursar.lecture.chapter{row.chapter}")
    said = (row.id, row.claim, row.notes, row.correct)
    function = _FUNCTIONS.get(row.id)
    if function is None:
        return Line(*said, verdict=row.verdict or None, reason=row.reason)
    try:
        found = function(row)
    except MissingExtra as error:
        return Line(*said, reason=f"needs the extra {error.extra}")
    return Line(*said, found.computed, found.verdict, tuple(found.holds.items()), tuple(found.follows.items()))
