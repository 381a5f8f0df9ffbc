"""The records, the page and the JSON of ``bursar formula``. No torch: they come from `workload/formula.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bursar.polynomial import Polynomial
from bursar.report.record import SCHEMA_VERSION
from bursar.report.text import line, note, table
from bursar.units import format_bytes, format_count, format_flops

_LABELS = {
    "forward": "forward",
    "backward": "backward",
    "model": "model = forward + backward",
    "recompute": "recompute",
    "hardware": "hardware = model + recompute",
    "attention": "attention, all phases",
    "attention_full_square": "attention, full-square",
    "optimizer": "optimizer",
    "total": "all kinds",
}


@dataclass(frozen=True, slots=True)
class Law:
    """One figure as a formula: the exact polynomial, and the same as a reader would write it."""

    polynomial: Polynomial
    formula: str


@dataclass(frozen=True, slots=True)
class Peak:
    """Peak bytes of one device around the sizes asked for: which polynomial, where it holds, and its neighbours."""

    law: Law
    n_bytes: int  # at the sizes asked for
    batch_sizes: tuple[int, int | None]  # it is the peak from here to there (None: on and on), the sequence as asked
    seq_lens: tuple[int, int | None] | None  # likewise, the batch as asked; None without a sequence
    where: str  # the op at which it stands
    others: tuple[Law, ...]  # what is the peak elsewhere: the peak is the most of all of them
    multiple: int = 1  # of S, for which alone it was found to hold


@dataclass(frozen=True, slots=True)
class Fits:
    """The largest step that fits a device; 0 where none does, None where nothing bounds it."""

    hardware: str
    usable_bytes: int  # less the reserve
    batch_size: int | None  # at the sequence asked for
    seq_len: int | None  # at the batch asked for; None without a sequence
    seq_len_limit: int | None  # what the model itself allows, where that is known
    verified: tuple[str, ...]  # what a trace at that size and at one more said


@dataclass(frozen=True)
class Formula:
    """What a step costs as formulas in B samples of S tokens. `bursar.formula` returns one."""

    name: str
    letters: tuple[str, ...]  # ("B",), ("B", "S"), and a callable's own widths
    at: Mapping[str, int]  # the sizes asked for
    symbols: Mapping[str, tuple[int, str]]  # letter -> (value, what it stands for)
    flops: Mapping[str, Law]
    parameters: Law
    peak: Peak | None
    widths: Mapping[str, Law]  # figures in the callable's widths too
    fits: Fits | None
    derivation: tuple[str, ...]
    assumptions: tuple[str, ...]


def formula_record(found: Formula) -> dict[str, Any]:
    """The JSON of the contract."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {"name": found.name, "parameters": int(found.parameters.polynomial(*found.at.values()))},
        "letters": list(found.letters),
        "at": dict(found.at),
        "symbols": {letter: {"value": value, "meaning": meaning} for letter, (value, meaning) in found.symbols.items()},
        "flops": {name: _law(law) for name, law in found.flops.items()},
        "parameters": _law(found.parameters),
        "peak_bytes": None if found.peak is None else _peak(found.peak),
        "widths": {name: _law(law) for name, law in found.widths.items()},
        "fits": None if found.fits is None else _fits(found.fits),
        "derivation": list(found.derivation),
        "assumptions": list(found.assumptions),
    }


def _law(law: Law) -> dict[str, Any]:
    terms = []
    for coefficient, monomial in law.polynomial.terms:
        term: dict[str, Any] = {"coefficient": coefficient.numerator}
        if coefficient.denominator != 1:
            term["divisor"] = coefficient.denominator
        powers = dict(zip(law.polynomial.letters, monomial.powers, strict=True))
        term |= {"B": 0, "S": 0} | powers
        if monomial.to > 1:
            term["rounded_up_to"] = monomial.to  # S, before its power is taken
        terms.append(term)
    return {"formula": law.formula, "polynomial": law.polynomial.text, "terms": terms}


def _peak(peak: Peak) -> dict[str, Any]:
    return {
        **_law(peak.law),
        "bytes": peak.n_bytes,
        "valid": {
            "batch_size": list(peak.batch_sizes),
            "seq_len": None if peak.seq_lens is None else list(peak.seq_lens),
            "seq_len_multiple_of": peak.multiple,
        },
        "at_op": peak.where,
        "elsewhere": [_law(law) for law in peak.others],
    }


def _fits(fits: Fits) -> dict[str, Any]:
    return {
        "hardware": fits.hardware,
        "usable_bytes": fits.usable_bytes,
        "batch_size": fits.batch_size,
        "seq_len": fits.seq_len,
        "seq_len_limit": fits.seq_len_limit,
        "verified": list(fits.verified),
    }


def render(found: Formula, *, explain: bool = False) -> Iterator[Any]:
    """Letters, FLOPs, parameters, peak, what fits; each part a renderable."""
    at = tuple(found.at.values())
    sizes = ", ".join(f"{letter} = {value}" for letter, value in found.at.items())
    yield line(f"{found.name}: {format_count(int(found.parameters.polynomial(*at)))} parameters, {sizes}", style="bold")
    yield table("", ("", "", ""), [(letter, f"{value}", meaning) for letter, (value, meaning) in found.symbols.items()])
    rows = []
    for name, law in found.flops.items():
        if law.polynomial.coefficients:
            rows.append((_LABELS.get(name, name), law.formula, format_flops(int(law.polynomial(*at)))))
            if law.formula != law.polynomial.text:
                rows.append(("", f"= {law.polynomial.text}", ""))
    yield table("FLOPs of one step (a multiply and an add are two)", ("", "formula", f"at {sizes}"), rows, left=2)
    memory = [("parameters N", found.parameters.formula, format_count(int(found.parameters.polynomial(*at))))]
    if found.peak is not None:
        memory.append(("peak bytes", found.peak.law.formula, format_bytes(found.peak.n_bytes)))
        if found.peak.law.formula != found.peak.law.polynomial.text:
            memory.append(("", f"= {found.peak.law.polynomial.text}", ""))
    yield table("Memory of one device", ("", "formula", f"at {sizes}"), memory, left=2)
    if found.peak is not None:
        yield from _where_it_holds(found.peak)
    if found.widths:
        yield table(
            "In the callable's own sizes",
            ("", "formula"),
            [(_LABELS.get(name, name), law.formula) for name, law in found.widths.items()],
            left=2,
        )
    if found.fits is not None:
        yield from _what_fits(found.fits, found.at)
    if explain:
        yield line("How derived", style="bold")
        for text in found.derivation:
            yield note(text)
    yield line("Assumptions", style="bold")
    for text in (*found.assumptions, *(() if explain else found.derivation[-1:])):
        yield note(text)


def _where_it_holds(peak: Peak) -> Iterator[Any]:
    ranges = [f"B {_range(*peak.batch_sizes)}"]
    if peak.seq_lens is not None:
        ranges.append(f"S {_range(*peak.seq_lens)}")
    yield note(f"The peak stands {peak.where}; this is the formula for {', or for '.join(ranges)}, the rest as asked.")
    if peak.multiple > 1:
        yield note(
            f"It holds where {peak.multiple} divides S: at other sequences the model allocates in another order."
        )
    for law in peak.others:
        yield note(f"Elsewhere it may be {law.formula}; the peak is the most of these.")


def _range(low: int, high: int | None) -> str:
    if high is None:
        return f"from {low} on" if low > 1 else "of any size"
    return f"of {low}" if low == high else f"from {low} to {high}"


def _what_fits(fits: Fits, at: Mapping[str, int]) -> Iterator[Any]:
    def most(n: int | None) -> str:
        return "any" if n is None else "none" if n == 0 else str(n)

    rows = [("largest batch B" + (f" at S = {at['S']}" if "S" in at else ""), most(fits.batch_size))]
    if "S" in at:
        limit = f" (the model takes {fits.seq_len_limit})" if fits.seq_len == fits.seq_len_limit is not None else ""
        rows.append((f"longest sequence S at B = {at['B']}", most(fits.seq_len) + limit))
    yield table(f"What fits one {fits.hardware}, {format_bytes(fits.usable_bytes)} usable", ("", ""), rows)
    for text in fits.verified:
        yield note(text)
