"""Exact polynomials from a few values: interpolation in fractions, evaluation, and how they are written. No torch.

A letter may be rounded up inside a term, ``⌈S/32⌉·32``: some kernels pad a sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

Powers = tuple[int, ...]
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class Monomial(NamedTuple):
    """A product of powers of the letters, the last of them rounded up to a multiple of ``to``."""

    powers: Powers
    to: int = 1

    def __call__(self, values: Sequence[int]) -> int:
        """Its value at ``values``, one per letter."""
        product = 1
        for i, (value, power) in enumerate(zip(values, self.powers, strict=True)):
            if power:
                product *= (-(-value // self.to) * self.to if i == len(values) - 1 else value) ** power
        return product

    def text(self, letters: Sequence[str]) -> str:
        """``B·S²``; empty for the constant."""
        names = [n if self.to == 1 or i < len(letters) - 1 else f"⌈{n}/{self.to}⌉" for i, n in enumerate(letters)]
        raised = [n + (str(p).translate(_SUPERSCRIPTS) if p > 1 else "")
                  for n, p in zip(names, self.powers, strict=True) if p]  # fmt: skip
        return "·".join(raised)


@dataclass(frozen=True)
class Polynomial:
    """A sum of coefficient × monomial in ``letters``; monomials without a coefficient are left out."""

    letters: tuple[str, ...]
    coefficients: Mapping[Monomial, Fraction]

    def __call__(self, *values: int) -> Fraction:
        """Its exact value at one value per letter."""
        return sum((c * m(values) for m, c in self.coefficients.items()), Fraction(0))

    def of(self, **powers: int) -> Fraction:
        """The coefficient of one monomial: ``p.of(B=1, S=2)``."""
        wanted = tuple(powers.get(name, 0) for name in self.letters)
        return self.coefficients.get(Monomial(wanted), Fraction(0))

    @cached_property
    def terms(self) -> tuple[tuple[Fraction, Monomial], ...]:
        """(coefficient, monomial), the constant first, then by degree and in the order of the letters."""
        order = sorted(self.coefficients, key=lambda m: (sum(m.powers), [-p for p in m.powers], m.to))
        return tuple((self.coefficients[m], m) for m in order)

    @property
    def text(self) -> str:
        """``741192192·B·S + 55296·B·S²``; 0 for nothing."""
        return self.written(self.terms)

    def written(self, terms: Iterable[tuple[Fraction, Monomial]]) -> str:
        """``terms`` as a sum."""
        parts = []
        for coefficient, monomial in terms:
            scale = coefficient * monomial.to ** (monomial.powers[-1] if monomial.powers else 0)
            factors = ["" if scale == 1 and any(monomial.powers) else str(scale), monomial.text(self.letters)]
            parts.append("·".join(filter(None, factors)))
        return " + ".join(parts).replace("+ -", "- ") or "0"


def basis(degrees: Sequence[int]) -> list[Powers]:
    """All powers up to ``degrees``, letter by letter.

    >>> basis((1, 2))
    [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    """
    return list(itertools.product(*(range(d + 1) for d in degrees)))


class Interpolation:
    """The one polynomial of given monomials through as many points, for any values there."""

    def __init__(
        self,
        letters: Sequence[str],
        points: Sequence[Powers],
        powers: Sequence[Powers],
        multiples: Iterable[int] = (1,),
    ) -> None:
        """As many ``points`` as ``powers``; ``multiples``: what the last letter may be rounded up to, in order."""
        self.letters, self.points, self.powers = tuple(letters), list(points), list(powers)
        self._inverses: list[tuple[int, list[list[Fraction]]]] = []
        for to in multiples:
            inverse = _inverse([[Fraction(Monomial(p, to)(point)) for p in self.powers] for point in self.points])
            if inverse is not None:
                self._inverses.append((to, inverse))

    @property
    def determined(self) -> bool:
        """Whether the points tell the monomials apart."""
        return bool(self._inverses)

    def fit(self, values: Sequence[int], checks: Iterable[tuple[Powers, int]] = ()) -> Polynomial | None:
        """The polynomial through ``values``, one per point, if it also holds at every check (point, value)."""
        seen = list(checks)
        for to, inverse in self._inverses:
            found = {}
            for powers, row in zip(self.powers, inverse, strict=True):
                coefficient = sum((a * v for a, v in zip(row, values, strict=True) if v), Fraction(0))
                if coefficient:
                    found[Monomial(powers, to if powers and powers[-1] else 1)] = coefficient
            made = Polynomial(self.letters, found)
            if all(made(*point) == value for point, value in seen):
                return made
        return None


def _inverse(matrix: list[list[Fraction]]) -> list[list[Fraction]] | None:
    """The inverse by elimination in fractions; None where there is none."""
    n = len(matrix)
    rows = [[*row, *(Fraction(int(i == j)) for j in range(n))] for i, row in enumerate(matrix)]
    for i in range(n):
        pivot = next((r for r in range(i, n) if rows[r][i]), None)
        if pivot is None:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        scale = rows[i][i]
        rows[i] = [x / scale for x in rows[i]]
        for r in range(n):
            if r != i and rows[r][i]:
                factor = rows[r][i]
                rows[r] = [x - factor * y for x, y in zip(rows[r], rows[i], strict=True)]
    return [row[n:] for row in rows]
