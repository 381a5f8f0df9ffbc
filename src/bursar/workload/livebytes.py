"""Live bytes over a step as polynomials of its sizes: the peak, how far a formula of it holds, the largest that fits.

Traces of one workload at different sizes allocate and free in the same order. So each storage's size is a polynomial of
its own (or one of ⌈S/32⌉, where a kernel pads), live bytes are their running sum, and the peak is the most of the sums:
every bend of the peak is known, none is sampled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np

from bursar.polynomial import Interpolation, Monomial, Polynomial, Powers, basis
from bursar.report.formula import Law, Peak
from bursar.report.reading import Symbols, read_bytes

MULTIPLES = (1, 8, 16, 32, 64, 128)  # what kernels pad a sequence to
FAR = {"B": 2**16, "S": 2**17}  # how far the peak's other formulas are looked for


@dataclass(frozen=True)
class Lines:
    """Live bytes at every event of the step, as integer coefficients of monomials; the peak is their maximum."""

    letters: tuple[str, ...]
    monomials: tuple[Monomial, ...]
    rows: np.ndarray  # distinct polynomials × monomials

    def values(self, at: Powers) -> list[int]:
        """Each polynomial's value."""
        features = [m(at) for m in self.monomials]
        largest = sum(abs(float(c)) * f for c, f in zip(np.abs(self.rows).max(axis=0), features, strict=True))
        kind: Any = np.int64 if largest < 2**62 else object
        found: list[int] = (self.rows.astype(kind) @ np.array(features, dtype=kind)).tolist()
        return found

    def peak_bytes(self, at: Powers) -> int:
        """The peak at these sizes."""
        return max(self.values(at))

    def polynomial(self, i: int) -> Polynomial:
        """One of them."""
        kept = {m: Fraction(int(c)) for m, c in zip(self.monomials, self.rows[i], strict=True) if c}
        return Polynomial(self.letters, kept)

    def peak(self, at: Powers, known: Symbols, where: str, limit: int | None) -> Peak:
        """The polynomial that is the peak at ``at``, how far it is, and what is the peak elsewhere."""
        values = self.values(at)
        best = int(np.argmax(np.array(values, dtype=object)))

        def holds(axis: int, n: int) -> bool:
            found = self.values((*at[:axis], n, *at[axis + 1 :]))
            return found[best] == max(found)

        ranges = [_reach(partial(holds, axis), at[axis], limit if axis else None) for axis in range(len(at))]
        axes = [_powers_of_two(FAR["B"]), _powers_of_two(limit or FAR["S"])]
        winners: dict[int, None] = {}
        for point in itertools.product(*axes[: len(at)]):
            there = self.values(point)
            winners[int(np.argmax(np.array(there, dtype=object)))] = None
        best_law = Law(self.polynomial(best), read_bytes(self.polynomial(best), known))
        others = tuple(Law(p, read_bytes(p, known)) for p in (self.polynomial(i) for i in winners if i != best))
        return Peak(best_law, values[best], ranges[0], ranges[1] if len(at) > 1 else None, where, others)

    def largest(self, at: Powers, axis: int, usable: int, limit: int | None) -> int | None:
        """The largest B (axis 0) or S (axis 1) whose peak is within ``usable``; 0 for none, None for no bound."""

        def fits(n: int) -> bool:
            return self.peak_bytes((*at[:axis], n, *at[axis + 1 :])) <= usable

        if not fits(1):
            return 0
        return _last(fits, 1, limit)


def _last(holds: Callable[[int], bool], low: int, limit: int | None) -> int | None:
    """The last n from ``low`` on for which a condition that holds there still does; None if it never ends."""
    step_ = 1
    while holds(low + step_):
        low += step_
        step_ *= 2
        if limit is not None and low + step_ > limit:
            return limit if holds(limit) else _between(holds, low, limit)
        if low > 2**50:
            return None
    return _between(holds, low, low + step_)


def _between(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The last that holds, between one that does and one that does not."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _reach(holds: Callable[[int], bool], at: int, limit: int | None) -> tuple[int, int | None]:
    """From where to where, around ``at``, the condition holds."""
    low = 1 if holds(1) else at - _between(lambda back: holds(at - back), 0, at - 1) if at > 1 else 1
    return low, at if limit is not None and at >= limit else _last(holds, at, limit)


def _powers_of_two(most: int) -> list[int]:
    return [n for n in (2**i for i in range(most.bit_length())) if n < most] + [most]


def live_bytes(
    letters: tuple[str, ...],
    points: Sequence[Powers],
    traced: Sequence[np.ndarray],
    checks: Sequence[Powers],
    checked: Sequence[np.ndarray],
) -> Lines | None:
    """Running sums of each storage's size as a polynomial; None where traces do not allocate alike.

    ``traced`` and ``checked`` have the bytes live when the step begins, then each allocation (+) and free (-) in order,
    of the step at each of ``points`` and ``checks``.
    """
    if len({len(s) for s in (*traced, *checked)}) > 1:
        return None
    kinds, which = np.unique(np.vstack([*traced, *checked]), axis=1, return_inverse=True)
    degrees = [len({p[i] for p in points}) - 1 for i in range(len(letters))]
    made = Interpolation(letters, points, basis(degrees), MULTIPLES if letters[-1] == "S" else (1,))
    n, found = len(points), []
    for column in kinds.T.tolist():
        sizes = made.fit(column[:n], list(zip(checks, column[n:], strict=True)))
        if sizes is None or any(c.denominator != 1 for c in sizes.coefficients.values()):
            return None
        found.append(sizes)
    monomials = tuple(sorted({m for p in found for m in p.coefficients}))
    by_kind = np.array([[int(p.coefficients.get(m, 0)) for m in monomials] for p in found], dtype=np.int64)
    running = np.cumsum(by_kind[which.reshape(-1)], axis=0)
    return Lines(letters, monomials, np.unique(running, axis=0))
