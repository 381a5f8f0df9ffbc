"""What a whole training run takes: one equation, solved for whichever part is missing.

    FLOPs = 6 · parameters · tokens                                  (or given)
    FLOPs = gpus · peak · MFU · seconds
    money = gpus · hours · price

Money is read two ways.  Where something else is missing a budget is spent in full and settles it; where nothing is,
the budget is a ceiling, and a run that costs more has no answer.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

from bursar.errors import BadInput, NoAnswer, UnknownName
from bursar.hardware import Accelerator, Cluster, accelerator, accelerators, cluster
from bursar.units import (
    SECONDS_PER_DAY,
    SECONDS_PER_YEAR,
    format_count,
    format_rate,
    format_seconds,
    format_usd,
    parse_count,
    parse_seconds,
)

__all__ = ["Magnitude", "Run", "batch_slip", "magnitude", "magnitudes", "price_of", "solve", "spent"]

_ASSUMED_MFU: Final = 0.5  # a large run's usual range is 0.2 to 0.57; the notes work with this
_LEAST, _MOST = 1e-30, 1e60  # beyond these a product of them could leave what a float holds
_LARGEST_STEP_TOKENS: Final = 10**9


@dataclass(frozen=True, slots=True)
class Magnitude:
    """A run, or a threshold of law, that people compare with.  FLOP of training."""

    name: str
    flops: float
    status: str  # published, rumour, law, revoked
    source: str


@dataclass(frozen=True, slots=True)
class Run:
    """A training run with every part filled in.  ``None`` is a part nothing was said of and nothing needed."""

    solved: str  # the part that was missing
    flops: float
    tokens: int | None
    parameters: int | None
    gpus: int
    peak_flops_per_s: float  # of one accelerator
    mfu: float
    seconds: float
    usd: float | None
    kwh: float | None
    accelerator: str | None = None
    dtype: str | None = None
    assumptions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    batch_tokens: int | None = None  # of one optimizer step

    @property
    def steps(self) -> int | None:
        """Optimizer steps, the last one perhaps not full; None where nothing says a step's tokens."""
        if self.batch_tokens is None or self.tokens is None:
            return None
        return -(-self.tokens // self.batch_tokens)

    @property
    def thresholds(self) -> tuple[tuple[Magnitude, bool], ...]:
        """Thresholds of law, in force or revoked, and whether the run's FLOP reach them."""
        return tuple((m, self.flops >= m.flops) for m in magnitudes() if m.status in ("law", "revoked"))

    @property
    def days(self) -> float:
        """``seconds`` in days."""
        return self.seconds / SECONDS_PER_DAY

    @property
    def years(self) -> float:
        """``seconds`` in years of 365.25 days."""
        return self.seconds / SECONDS_PER_YEAR

    @property
    def gpu_hours(self) -> float:
        """Accelerator-hours, all of them together."""
        return self.gpus * self.seconds / 3600

    def record(self) -> dict[str, object]:
        """The fields of ``bursar run --json``."""
        return {
            "flops": self.flops,
            "tokens": self.tokens,
            "parameters": self.parameters,
            "gpus": self.gpus,
            "mfu": self.mfu,
            "seconds": self.seconds,
            "days": self.days,
            "gpu_hours": self.gpu_hours,
            "usd": self.usd,
            "kwh": self.kwh,
            "steps": self.steps,
            "step_seconds": None if self.steps is None else self.seconds / self.steps,
            "thresholds": [
                {"name": m.name, "flops": m.flops, "status": m.status, "reached": reached}
                for m, reached in self.thresholds
            ],
            "solved": self.solved,
            "assumptions": list(self.assumptions),
            "warnings": list(self.warnings),
        }


def solve(
    *,
    flops: float | str | None = None,
    parameters: float | str | None = None,
    tokens: float | str | None = None,
    batch: float | str | None = None,
    seq_len: float | str | None = None,
    steps: float | str | None = None,
    on: Cluster | Accelerator | str | None = None,
    gpus: float | str | None = None,
    peak_flops_per_s: float | None = None,
    dtype: str = "bf16",
    mfu: float | None = None,
    seconds: float | str | None = None,
    days: float | None = None,
    budget_usd: float | None = None,
    usd_per_gpu_hour: float | None = None,
    pue: float | None = None,
    batch_tokens: float | str | None = None,
) -> Run:
    """The run with its missing part filled in.

    The work is ``flops`` (a number, or a name in ``catalog/magnitudes.toml``), or ``parameters`` and ``tokens``, where
    ``batch`` sequences of ``seq_len`` for ``steps`` may stand for the tokens.  Of the work, the number of accelerators
    (``gpus``, or a `Cluster` or ``"8xh100-sxm"`` as ``on``), ``mfu``, the time (``seconds`` or ``days``) and
    ``budget_usd``, one is left out.  A bare accelerator names the kind, not the number.

    An MFU of 0.5 is assumed where it is not given and something else is asked for.  A number of accelerators is rounded
    up to a whole one, or down where a budget sets it; parameters and tokens are rounded down.  ``batch_tokens`` says
    how many steps that is, and changes nothing else.

    Raises `BadInput` for too little, too much or impossible input, `NoAnswer` for an MFU above 1 or a budget exceeded.

    >>> solve(parameters="70B", tokens="15T", on="1024xh100-sxm", mfu=0.5).days  # doctest: +ELLIPSIS
    143.94...
    """
    for name, value in (("parameters", parameters), ("tokens", tokens), ("steps", steps)):
        _count(name, value)  # a figure that cannot be read is the first thing to say
    notes: list[str] = []
    device, counted = _device(on)
    n = _count("gpus", gpus)
    if counted is not None and n is not None:
        raise BadInput(f"the number of accelerators is given twice: {counted} by the cluster and {n} as gpus; drop one")
    n = counted if n is None else n
    peak = _peak(device, peak_flops_per_s, dtype, notes)
    price = _price(device, usd_per_gpu_hour, notes)

    step_tokens, warned = _step_tokens(batch, seq_len)
    if step_tokens is not None and batch_tokens is not None:
        raise BadInput("a step's tokens are given twice, as batch and seq_len and as batch_tokens; drop one")
    work, n_parameters, n_tokens = _work(flops, parameters, tokens, step_tokens, steps, notes)
    time = _time(seconds, days)
    used = None if mfu is None else _positive("mfu", mfu)
    if used is not None:
        _possible(used, "is asked for")
    budget = None if budget_usd is None else _positive("budget_usd", budget_usd)
    if budget is not None and price is None:
        raise BadInput("a budget needs a price: give usd_per_gpu_hour, for the catalogue has none for this accelerator")

    solved, work, n, used, time = _fill(work, n, used, time, budget, price, peak, notes, device, n_parameters, n_tokens)

    if solved == "flops" and n_parameters is not None:
        solved, n_tokens = "tokens", _down("tokens", work / (6 * n_parameters))
        work = 6 * n_parameters * n_tokens
    elif solved == "flops" and n_tokens is not None:
        solved, n_parameters = "parameters", _down("parameters", work / (6 * n_tokens))
        work = 6 * n_parameters * n_tokens
    elif n_parameters is not None and n_tokens is None:
        n_tokens = _down("tokens", work / (6 * n_parameters))
    elif n_tokens is not None and n_parameters is None:
        n_parameters = _down("parameters", work / (6 * n_tokens))

    usd = None if price is None else n * time / 3600 * price
    if budget is not None and usd is not None and usd > budget * (1 + 1e-9):
        raise NoAnswer(
            f"over budget: {n} accelerators for {format_seconds(time)} cost {format_usd(usd)}, "
            f"{usd / budget:.3g} times the {format_usd(budget)} given"
        )
    return Run(
        solved=solved,
        flops=work,
        tokens=n_tokens,
        parameters=n_parameters,
        gpus=n,
        peak_flops_per_s=peak,
        mfu=used,
        seconds=time,
        usd=usd,
        kwh=_kwh(device, n, time, pue, notes),
        accelerator=None if device is None else device.name,
        dtype=None if device is None or peak_flops_per_s is not None else dtype,
        assumptions=tuple(notes),
        warnings=() if warned is None else (warned,),
        batch_tokens=step_tokens if batch_tokens is None else _count("batch_tokens", batch_tokens),
    )


def price_of(device: Accelerator, usd_per_gpu_hour: float | None = None) -> float | None:
    """US dollars per hour of one accelerator: what is given, else the catalogue's; None where neither is known."""
    return device.usd_per_gpu_hour if usd_per_gpu_hour is None else _positive("usd_per_gpu_hour", usd_per_gpu_hour)


def spent(
    on: Cluster, seconds: float, usd_per_gpu_hour: float | None = None, pue: float | None = None
) -> tuple[float | None, float | None]:
    """US dollars and kWh of ``seconds`` on all of a cluster; None where no price, or no board power, is known.

    >>> spent(cluster("8xh100-sxm"), 3600, usd_per_gpu_hour=2.0)
    (16.0, 5.6)
    """
    price = price_of(on.accelerator, usd_per_gpu_hour)
    usd = None if price is None else on.count * seconds / 3600 * price
    return usd, _kwh(on.accelerator, on.count, seconds, pue, [])


def batch_slip(batch: int, seq_len: int) -> str | None:
    """What is wrong with a step of ``batch`` sequences of ``seq_len`` tokens, if it can hardly be meant.

    A batch quoted in tokens and multiplied by the sequence length again is the usual slip.

    >>> batch_slip(4_000_000, 2048)
    'a step of 4M sequences of 2048 tokens is 8.19B tokens; if 4M is already in tokens, it is 1.95k sequences'
    >>> batch_slip(1024, 1024) is None
    True
    """
    if batch * seq_len <= _LARGEST_STEP_TOKENS:
        return None
    return (
        f"a step of {format_count(batch)} sequences of {seq_len} tokens is {format_count(batch * seq_len)} tokens; "
        f"if {format_count(batch)} is already in tokens, it is {format_count(batch / seq_len)} sequences"
    )


def magnitudes() -> tuple[Magnitude, ...]:
    """Every row of ``catalog/magnitudes.toml``, in its order."""
    return tuple(_magnitudes().values())


def magnitude(name: str) -> Magnitude:
    """The row called ``name``.  Raises `UnknownName`.

    >>> magnitude("gpt3").flops
    3.14e+23
    """
    try:
        return _magnitudes()[name.strip().lower()]
    except KeyError:
        hint = "Give a value such as 3.14e23, or add a row to catalog/magnitudes.toml."
        raise UnknownName("training run", name, _magnitudes(), hint) from None


@cache
def _magnitudes() -> Mapping[str, Magnitude]:
    text = files("bursar").joinpath("catalog", "magnitudes.toml").read_text(encoding="utf-8")
    return {name: Magnitude(name, **row) for name, row in tomllib.loads(text).items()}


# ---------------------------------------------------------------------------------------------- reading what is given


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadInput(f"{name} is {value!r}; give a number")
    if not _LEAST <= value <= _MOST:  # NaN is neither
        raise BadInput(f"{name} is {value!r}; give a finite number above zero")
    return value


def _count(name: str, value: float | str | None) -> int | None:
    if value is None:
        return None
    number = parse_count(value)
    _positive(name, number)
    return number


def _down(name: str, value: float) -> int:
    if value < 1:
        raise NoAnswer(f"{name}: what is given buys {value:.2g}, which is less than one")
    return math.floor(value)


def _possible(mfu: float, how: str) -> None:
    if mfu > 1:
        raise NoAnswer(f"impossible: an MFU of {mfu:.4g} {how}, and 1 is the dense peak itself")


def _device(on: Cluster | Accelerator | str | None) -> tuple[Accelerator | None, int | None]:
    """The kind of accelerator, and how many where that is said."""
    if isinstance(on, str):
        named = on.strip().lower()
        on = accelerator(named) if any(row.name == named for row in accelerators()) else cluster(on)
    if isinstance(on, Cluster):
        return on.accelerator, on.count
    return on, None


def _peak(device: Accelerator | None, given: float | None, dtype: str, notes: list[str]) -> float:
    if given is not None:
        return _positive("peak_flops_per_s", given)
    if device is None:
        raise BadInput("no peak: name an accelerator, such as h100-sxm (--on h100-sxm, on='h100-sxm')")
    peak = device.peak(dtype)
    notes.append(f"peak of {device.name}: {format_rate(peak, 'FLOP')} in {dtype}, dense")
    return peak


def _price(device: Accelerator | None, given: float | None, notes: list[str]) -> float | None:
    if given is not None:
        return _positive("usd_per_gpu_hour", given)
    if device is None or device.usd_per_gpu_hour is None:
        return None
    notes.append(
        f"price: {format_usd(device.usd_per_gpu_hour)} per GPU-hour, {device.price_source}, {device.price_date}"
    )
    return device.usd_per_gpu_hour


def _time(seconds: float | str | None, days: float | None) -> float | None:
    if seconds is not None and days is not None:
        raise BadInput("the time is given twice, as seconds and as days; drop one")
    if days is not None:
        return _positive("days", days) * SECONDS_PER_DAY
    return None if seconds is None else _positive("seconds", parse_seconds(seconds))


def _step_tokens(batch: float | str | None, seq_len: float | str | None) -> tuple[int | None, str | None]:
    """Tokens of one step, and what is odd about them."""
    b, s = _count("batch", batch), _count("seq_len", seq_len)
    if b is None and s is None:
        return None, None
    if b is None or s is None:
        raise BadInput("a batch in sequences and a seq_len go together; give both, or the tokens of the whole run")
    return b * s, batch_slip(b, s)


def _work(
    flops: float | str | None,
    parameters: float | str | None,
    tokens: float | str | None,
    step_tokens: int | None,
    steps: float | str | None,
    notes: list[str],
) -> tuple[float | None, int | None, int | None]:
    """FLOPs, parameters and tokens, each ``None`` where it is not given and does not follow."""
    n_parameters, n_tokens, n_steps = _count("parameters", parameters), _count("tokens", tokens), _count("steps", steps)
    if (step_tokens is None) != (n_steps is None):
        raise BadInput("tokens from a batch need batch, seq_len and steps, all three")
    if step_tokens is not None and n_steps is not None:
        if n_tokens is not None:
            raise BadInput("the tokens are given twice, as tokens and as batch, seq_len and steps; drop one")
        n_tokens = step_tokens * n_steps
    total = _flops(flops, notes)
    if n_parameters is not None and n_tokens is not None:
        if total is not None:
            raise BadInput("given: flops, parameters, tokens; two of these fix the third, so drop one")
        total = 6 * n_parameters * n_tokens
    if n_parameters is not None or n_tokens is not None:
        notes.append("training FLOPs = 6 · parameters · tokens, without attention's own term")
    return total, n_parameters, n_tokens


def _flops(given: float | str | None, notes: list[str]) -> float | None:
    if given is None:
        return None
    if not isinstance(given, str):
        return _positive("flops", given)
    if given.strip().lower() not in _magnitudes() and given.strip()[:1] in set("0123456789.-−+"):
        return _positive("flops", parse_count(given))
    known = magnitude(given)
    notes.append(f"{known.name}: {known.flops:.3g} FLOP, {known.status} ({known.source})")
    return known.flops


# ------------------------------------------------------------------------------------------------------------- solving


def _fill(
    work: float | None,
    n: int | None,
    mfu: float | None,
    time: float | None,
    budget: float | None,
    price: float | None,
    peak: float,
    notes: list[str],
    device: Accelerator | None,
    n_parameters: int | None,
    n_tokens: int | None,
) -> tuple[str, float, int, float, float]:
    """The name of the missing part, then FLOPs, number, MFU and seconds, all filled in."""
    given = [
        name
        for name, value in (
            ("flops", work if n_parameters is None or n_tokens is None else None),
            ("parameters", n_parameters), ("tokens", n_tokens), ("gpus", n), ("mfu", mfu), ("time", time),
            ("budget", budget),
        )
        if value is not None
    ]  # fmt: skip
    said = f"given: {', '.join(given) or 'nothing'}"

    if None not in (work, n, mfu, time):
        raise BadInput(f"{said}; the rest fix any one of gpus, mfu and time, so drop one")

    # a budget settles the number or the time where MFU or the work is what is asked for; elsewhere it is a ceiling
    if budget is not None and price is not None and (work is None or mfu is None):
        gpu_seconds = budget / price * 3600
        if n is not None and time is None:
            time = gpu_seconds / n
            notes.append(f"the whole budget of {format_usd(budget)} is spent, which sets the time")
        elif n is None and time is not None:
            n = _down("gpus", gpu_seconds / time * (1 + 1e-12))
            notes.append(f"the whole budget of {format_usd(budget)} is spent, which sets the number of accelerators")
    if n is None and time is None and device is not None and (work is not None or budget is not None):
        n = 1
        notes.append(f"one {device.name}, as no number and no time was given")
        if budget is not None and price is not None and (work is None or mfu is None):
            time = budget / price * 3600

    if work is None:
        if n is None or time is None:
            lacks = [name for name, value in (("gpus", n), ("time", time)) if value is None]
            raise BadInput(f"{said}; add the work (flops, or parameters and tokens), or all of {', '.join(lacks)}")
        if mfu is None:
            mfu = _assumed_mfu(notes)
        return "flops", n * peak * mfu * time, n, mfu, time

    if n is not None and time is not None:
        needed = work / (n * peak * time)
        _possible(needed, f"would be needed to do {work:.3g} FLOP on {n} accelerators in {format_seconds(time)}")
        return "mfu", work, n, needed, time

    if n is None and time is None:
        raise BadInput(f"{said}; add gpus or a time")
    if mfu is None:
        mfu = _assumed_mfu(notes)
    if n is not None:
        return "seconds", work, n, mfu, work / (n * peak * mfu)
    assert time is not None
    exact = work / (peak * mfu * time)
    n = max(1, math.ceil(exact * (1 - 1e-12)))  # a whole number that floats missed by a hair stays whole
    if not math.isclose(n, exact, rel_tol=1e-9):
        notes.append(f"{exact:.6g} accelerators rounded up to {n}, which takes a little less than the time given")
    return "gpus", work, n, mfu, work / (n * peak * mfu)


def _assumed_mfu(notes: list[str]) -> float:
    notes.append(f"MFU {_ASSUMED_MFU} assumed, as none was given")
    return _ASSUMED_MFU


def _kwh(device: Accelerator | None, n: int, time: float, pue: float | None, notes: list[str]) -> float | None:
    """Energy at full board power, and ``pue`` times that for the building.  ``None`` where the power is not known."""
    if pue is not None and _positive("pue", pue) < 1:
        raise BadInput(f"pue is {pue!r}; a building uses at least what its machines do, so give 1 or more")
    if device is None or device.tdp_watts is None:
        return None
    if pue is None:
        notes.append("energy: PUE 1.0 assumed, and full board power throughout, without the hosts")
    return n * device.tdp_watts * time * (1.0 if pue is None else pue) / 3.6e6
