"""How much a figure may rise from one step to the next: ``--max-increase``, in exact fractions. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction

from bursar.diff import FIGURES, Diff
from bursar.errors import BadInput, UnknownName

GATES = {"flops": "flops.total", "bytes": "bytes_moved.total", "peak": "memory.peak_bytes",
         "time": "time.roofline_seconds"}  # fmt: skip
_ALL = "all"
_PERCENT = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?%")


def limits(text: str) -> dict[str, Fraction]:
    """How much each of GATES may rise, as a share: "2%" for all, "flops=2%,peak=0%" for these, "2%,peak=0%" for both.

    Raises BadInput and UnknownName.

    >>> limits("flops=2%,peak=0.5%")
    {'flops': Fraction(1, 50), 'peak': Fraction(1, 200)}
    """
    found: dict[str, Fraction] = {}
    for part in text.split(","):
        name, equals, share = (x.strip() for x in part.rpartition("="))
        if equals and name not in GATES:
            raise UnknownName("figure to limit", name, GATES, "As in --max-increase flops=2%,peak=0%.")
        if (name or _ALL) in found:
            raise BadInput(f"--max-increase {text!r} says twice how much {name or 'all'} may rise")
        found[name or _ALL] = _percent(share, text)
    rest = found.pop(_ALL, None)
    return found if rest is None else {**dict.fromkeys(GATES, rest), **found}


def _percent(share: str, text: str) -> Fraction:
    found = _PERCENT.fullmatch(share)
    if found is None:
        raise BadInput(
            f"--max-increase {text!r}: {share!r} is no percentage of 0 or more; write 2%, or "
            "flops=2%,bytes=2%,peak=0%,time=1%"
        )
    return Fraction(found[1]) / 100


def rose(diff: Diff, allowed: Mapping[str, Fraction]) -> list[str]:
    """What rose over its limit, in words; empty where all is within.

    A figure that one side does not have (time, in a saved record without a device) is left out where all were limited.
    Raises BadInput where it was named.
    """
    by_figure = {c.figure: c for c in diff.figures}
    said: list[str] = []
    for gate, limit in allowed.items():
        change = by_figure[GATES[gate]]
        if change.before is None or change.after is None:
            if len(allowed) < len(GATES):
                raise BadInput(f"--max-increase {gate}: the two sides have no {gate} to compare")
            continue
        before, after = Fraction(change.before), Fraction(change.after)
        percent = f"{float(limit * 100):g} %"
        if after > before * (1 + limit):
            by = f"by {float((after / before - 1) * 100):.2f} %" if before else f"from nothing to {change.after}"
            said.append(f"{FIGURES[change.figure][0]} rose {by}, allowed is {percent}")
        if gate == "flops" and diff.uncounted:
            said.append(
                f"FLOPs rose by an unknown amount: B leaves {', '.join(diff.uncounted)} uncounted where A does not"
            )
    return said
