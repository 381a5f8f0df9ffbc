"""The page of ``bursar levers``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bursar.plan.levers import Levers, Outcome, Set
from bursar.report.text import line, note, table
from bursar.step_time import parameters
from bursar.units import format_bytes, format_count, format_seconds, format_share


def render(found: Levers, *, explain: bool = False) -> Iterator[Any]:
    """Each lever alone, the sets that fit, and how far they go."""
    job, on = found.job, found.on
    yield line(
        f"{job.model.name}: {format_count(parameters(job.model))} parameters on {on.name}, {job.micro_batch} × "
        f"{job.seq_len} tokens per device",
        style="bold",
    )
    yield line(
        f"Without levers: {format_bytes(found.base.device_bytes)} of {format_bytes(found.usable_bytes)}, "
        f"{'fits' if found.fits(found.base) else 'does not fit'}; {format_seconds(found.base.step_seconds)} a step"
    )
    rows = [_row(found, x.lever.name, x.outcome) for x in found.alone if x.outcome is not None]
    yield table("Each alone", ("lever", "saves", "needs", "time", "fits"), rows)
    other = [x.lever.name for x in found.alone if x.outcome is not None and not x.lever.same_mathematics]
    if other:
        yield note(f"time is per token; {', '.join(other)} train another thing and are in none of the sets below")
    nothing: dict[str, list[str]] = {}
    for x in found.alone:
        if x.outcome is None:
            nothing.setdefault(x.why, []).append(x.lever.name)
    for why, names in nothing.items():
        yield note(f"{', '.join(names)}: changes nothing here; {why}")
    yield from _sets(found)
    yield table(
        "The largest that fits, the other sizes as asked (the sequence with a micro-batch of 1)",
        ("", "batch", "sequence", "parameters", "blocks"),
        [
            (
                _KIND[name], "any" if x.batch is None else f"{x.batch:,}", f"{x.seq_len:,}",
                format_count(x.parameters) if x.parameters else "none", f"{x.n_layers}",
            )
            for name, x in found.largest.items()
        ],
    )  # fmt: skip
    if found.break_even_density is not None:
        yield line(
            f"Sparse gradients send less than dense ones below a density of {found.break_even_density:.3g}: "
            f"2g / (n(g + 4)) for {on.count} devices"
        )
    if explain:
        yield line("Where the figures come from", style="bold")
        yield note("needs: rank_memory, the function that bursar validate scores; time: step_time, likewise")
        for x in found.alone:
            yield note(f"{x.lever.name}: {x.lever.title}. {x.lever.source}")
    yield line("Assumptions", style="bold")
    for text in found.assumptions:
        yield note(text)


_KIND = {"base": "without levers", "cheapest": "the cheapest set", "together": "the least memory"}


def _row(found: Levers, name: str, outcome: Outcome) -> tuple[str, ...]:
    saved = found.base.device_bytes - outcome.device_bytes
    share = outcome.token_seconds / found.base.token_seconds - 1
    time = "0 %" if abs(share) < 5e-5 else f"{'+' if share > 0 else '−'}{format_share(abs(share))}"
    sign = "" if saved >= 0 else "−"
    return (name, sign + format_bytes(abs(saved)), format_bytes(outcome.device_bytes), time,
            "yes" if found.fits(outcome) else "no")  # fmt: skip


def _sets(found: Levers) -> Iterator[Any]:
    if found.cheapest is None or found.fewest is None:
        yield line("No set of levers makes it fit.", style="bold")
    else:
        yield line(_words("The cheapest set that fits", found.cheapest, found), style="bold")
        if found.fewest.names != found.cheapest.names:
            yield line(_words("The fewest", found.fewest, found))
    yield line(_words("The least memory", found.together, found))


def _words(what: str, chosen: Set, found: Levers) -> str:
    share = chosen.outcome.token_seconds / found.base.token_seconds - 1
    time = f"{format_share(abs(share))} {'slower' if share > 0 else 'faster'}" if abs(share) > 5e-5 else "as fast"
    names = ", ".join(chosen.names) or "none is needed"
    return f"{what}: {names}; {format_bytes(chosen.outcome.device_bytes)}, {time}"
