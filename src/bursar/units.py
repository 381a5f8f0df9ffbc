"""Read and write quantities: counts, bytes, rates, durations, shares, money.

Suffixes are decimal (k = 1 000), GB is 10⁹ bytes and GiB is 2³⁰, and one never stands for the other.  What is read is
read exactly, in decimal arithmetic: ``parse_count("15T")`` is an ``int`` with no float on the way.  What is written is
rounded for a reader, and a number that is not finite, or not there, is written ``n/a``.

A year is 365.25 days (the Julian year), here and everywhere in bursar.
"""

from __future__ import annotations

import math
import re
from decimal import ROUND_HALF_EVEN, Context, Decimal
from typing import Final, Literal, SupportsFloat, SupportsIndex, TypeAlias

from bursar.errors import BadInput

__all__ = [
    "SECONDS_PER_DAY",
    "SECONDS_PER_YEAR",
    "format_bytes",
    "format_count",
    "format_flops",
    "format_rate",
    "format_seconds",
    "format_share",
    "format_usd",
    "parse_bytes",
    "parse_count",
    "parse_rate",
    "parse_seconds",
    "write_count",
]

Number: TypeAlias = SupportsIndex | SupportsFloat  # numpy's integers are the first, its floats the second

SECONDS_PER_DAY: Final = 86_400
SECONDS_PER_YEAR: Final = 31_557_600  # 365.25 days

# b, g and t cannot be taken for anything else; m, p and e can (milli, pico, an exponent), so those stay capital
_COUNT: Final = {
    "": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "b": 10**9, "G": 10**9, "g": 10**9,
    "T": 10**12, "t": 10**12, "P": 10**15, "E": 10**18,
}  # fmt: skip
_DECIMAL: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15, "e": 10**18}
_BINARY: Final = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40, "pi": 2**50, "ei": 2**60}
_SECONDS: Final[dict[str, Decimal | int]] = {
    "ns": Decimal("1e-9"), "us": Decimal("1e-6"), "µs": Decimal("1e-6"), "μs": Decimal("1e-6"), "ms": Decimal("1e-3"),
    "s": 1, "sec": 1, "second": 1, "seconds": 1, "min": 60, "minute": 60, "minutes": 60,
    "h": 3600, "hr": 3600, "hour": 3600, "hours": 3600, "d": 86_400, "day": 86_400, "days": 86_400,
    "w": 604_800, "week": 604_800, "weeks": 604_800, "y": SECONDS_PER_YEAR, "yr": SECONDS_PER_YEAR,
    "year": SECONDS_PER_YEAR, "years": SECONDS_PER_YEAR,
}  # fmt: skip

# three digits of exponent at most, so that no input can ask for a billion-digit integer
_NUMBER: Final = re.compile(r"((?:\d+(?:_\d+)*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?)\s*(\D*)", re.ASCII)
_LONGEST: Final = 80
_EXACT: Final = Context(prec=2000)  # wide enough for any product of what those allow

_COUNT_ACCEPTS: Final = "a whole number such as 15T, 70B, 16M, 1e13 or 15_000"
_BYTES_ACCEPTS: Final = "a size with its unit, such as 80GB (10⁹), 80GiB (2³⁰) or 512 MB"
_RATE_ACCEPTS: Final = "a rate such as 3.35TB/s or 989.4 TFLOP/s"
_SECONDS_ACCEPTS: Final = "a duration with its unit, such as 144 days, 3h, 2w, 90s or 1.5y"


# ---------------------------------------------------------------------------------------------------------- reading


def parse_count(text: str | Number) -> int:
    """The whole number that ``text`` names, exactly.  Raises `BadInput` for anything negative, fractional or unclear.

    >>> parse_count("15T"), parse_count("70B"), parse_count("1e13"), parse_count("15_000"), parse_count("1.5k")
    (15000000000000, 70000000000, 10000000000000, 15000, 1500)
    """
    if not isinstance(text, str):
        return _whole(_given(text, "count", _COUNT_ACCEPTS), text, "count", _COUNT_ACCEPTS)
    number, suffix = _split(text, "count", _COUNT_ACCEPTS)
    if suffix not in _COUNT:
        raise _refuse("count", text, f"{suffix!r} is not one of k M B G T P E", _COUNT_ACCEPTS)
    return _whole(_EXACT.multiply(number, _COUNT[suffix]), text, "count", _COUNT_ACCEPTS)


def parse_bytes(text: str | SupportsIndex) -> int:
    """Bytes; an ``int`` is taken as bytes already.  A fraction of a byte is rounded to the nearest.

    >>> parse_bytes("80GB"), parse_bytes("80GiB"), parse_bytes("512 MB")
    (80000000000, 85899345920, 512000000)
    """
    if not isinstance(text, str):
        return _whole(_given(text, "size", _BYTES_ACCEPTS), text, "size", _BYTES_ACCEPTS)
    number, unit = _split(text, "size", _BYTES_ACCEPTS)
    scale = _byte_unit(unit)
    if scale is None:
        raise _refuse("size", text, f"{unit!r} is not a unit of bytes" if unit else "it has no unit", _BYTES_ACCEPTS)
    return int(_EXACT.multiply(number, scale).to_integral_value(ROUND_HALF_EVEN))


def parse_rate(text: str | Number, of: Literal["bytes", "flops"] | None = None) -> float:
    """Bytes per second or FLOP per second; a bare number is taken as that already.  ``of`` refuses the other kind.

    >>> parse_rate("3.35TB/s"), parse_rate("989.4 TFLOP/s")
    (3350000000000.0, 989400000000000.0)
    """
    if not isinstance(text, str):
        return _float(_given(text, "rate", _RATE_ACCEPTS), text, "rate", _RATE_ACCEPTS)
    number, unit = _split(text, "rate", _RATE_ACCEPTS)
    if flops := re.fullmatch(r"([kMGTPE]?)FLOP(?:S|s?/s)", unit):
        kind, scale = "flops", _DECIMAL[flops[1].lower()]
    elif unit.endswith("/s") and (found := _byte_unit(unit[:-2])) is not None:
        kind, scale = "bytes", found
    else:
        why = f"{unit!r} is neither FLOP/s nor bytes per second" if unit else "it has no unit"
        raise _refuse("rate", text, why, _RATE_ACCEPTS)
    if of is not None and of != kind:
        raise _refuse("rate", text, f"it counts {kind}, and {of} are asked for", _RATE_ACCEPTS)
    return _float(_EXACT.multiply(number, scale), text, "rate", _RATE_ACCEPTS)


def parse_seconds(text: str | Number) -> float:
    """Seconds; a bare number is taken as seconds already.  A year is 365.25 days.

    >>> parse_seconds("144 days"), parse_seconds("3h"), parse_seconds("2w"), parse_seconds("90s"), parse_seconds("1.5y")
    (12441600.0, 10800.0, 1209600.0, 90.0, 47336400.0)
    """
    if not isinstance(text, str):
        return _float(_given(text, "duration", _SECONDS_ACCEPTS), text, "duration", _SECONDS_ACCEPTS)
    number, unit = _split(text, "duration", _SECONDS_ACCEPTS)
    if unit not in _SECONDS:
        why = f"{unit!r} is not a unit of time" if unit else "it has no unit"
        raise _refuse("duration", text, why, _SECONDS_ACCEPTS)
    return _float(_EXACT.multiply(number, _SECONDS[unit]), text, "duration", _SECONDS_ACCEPTS)


def _split(text: str, what: str, accepts: str) -> tuple[Decimal, str]:
    """The number at the head of ``text`` and the unit after it."""
    stripped = text.strip()
    if len(stripped) > _LONGEST:
        raise _refuse(what, stripped[:20] + "…", f"it is longer than {_LONGEST} characters", accepts)
    if re.match(r"[-−]\s*[\d.]", stripped):
        raise _refuse(what, text, "it is negative", accepts)
    found = _NUMBER.fullmatch(stripped)
    if found is None:
        raise _refuse(what, text, "it does not begin with a number" if stripped else "it is empty", accepts)
    return Decimal(found[1].replace("_", "")), found[2]


def _given(value: Number, what: str, accepts: str) -> Decimal:
    """A number that came as a number: finite and not negative."""
    if isinstance(value, bool):
        raise _refuse(what, value, "it is a truth value", accepts)
    try:
        number = _decimal(value)
    except (TypeError, ValueError):
        raise _refuse(what, value, "it is not a number", accepts) from None
    if not number.is_finite():
        raise _refuse(what, value, "it is not finite", accepts)
    if number < 0:
        raise _refuse(what, value, "it is negative", accepts)
    return number


def _whole(number: Decimal, asked: object, what: str, accepts: str) -> int:
    if number != number.to_integral_value():
        raise _refuse(what, asked, "it is not whole", accepts)
    return int(number)


def _float(number: Decimal, asked: object, what: str, accepts: str) -> float:
    if math.isinf(value := float(number)):
        raise _refuse(what, asked, "it is too large", accepts)
    return value


def _byte_unit(unit: str) -> int | None:
    """Bytes in one ``unit``.  Gb and Gbit are bits, and a bare G could be either kind of giga: neither is taken."""
    if re.fullmatch(r"[kKMGTPE]i?b", unit) or not unit.endswith(("B", "b")):
        return None
    prefix = unit[:-1].lower()
    return _DECIMAL.get(prefix, _BINARY.get(prefix))


def _refuse(what: str, asked: object, why: str, accepts: str) -> BadInput:
    return BadInput(f"cannot read {asked!r} as a {what}: {why}; give {accepts}")


# ---------------------------------------------------------------------------------------------------------- writing


def format_count(n: Number | None, digits: int = 3) -> str:
    """``n`` to ``digits`` significant digits; whole numbers below 1000 in full, from 10¹⁵ on as a power of ten.

    >>> format_count(496), format_count(15 * 10**12), format_count(173_950_000_000), format_count(6.3e24)
    ('496', '15T', '174B', '6.3e24')
    """
    if not _finite(n):
        return "n/a"
    return _scaled(n, digits, ("", "k", "M", "B", "T"), 1000, strip=True)


def write_count(n: int) -> str:
    """``n`` exactly, as short as `parse_count` reads it back.

    >>> write_count(15 * 10**12), write_count(16_500_000), write_count(8192), write_count(2**24)
    ('15T', '16.5M', '8192', '16777216')
    """
    for suffix, power in (("T", 12), ("B", 9), ("M", 6)):
        if abs(n) >= 10**power and not n % 10 ** (power - 2):
            return _plain(Decimal(n).scaleb(-power)) + suffix
    return str(n)


def format_flops(flops: Number | None) -> str:
    """FLOP to three significant digits; from 10²¹ on as a power of ten.

    >>> format_flops(432), format_flops(2**43), format_flops(6.3e24)
    ('432 FLOP', '8.80 TFLOP', '6.30e24 FLOP')
    """
    if not _finite(flops):
        return "n/a"
    return _scaled(flops, 3, (" ", " k", " M", " G", " T", " P", " E"), 1000) + "FLOP"


def format_bytes(n_bytes: Number | None, *, binary: bool = False) -> str:
    """Bytes to three significant digits, in powers of 1000, or of 1024 when ``binary``.

    >>> format_bytes(496), format_bytes(80e9), format_bytes(85_520_809_984, binary=True)
    ('496 B', '80.0 GB', '79.6 GiB')
    """
    if not _finite(n_bytes):
        return "n/a"
    if binary:
        return _scaled(n_bytes, 3, (" ", " Ki", " Mi", " Gi", " Ti", " Pi", " Ei"), 1024) + "B"
    return _scaled(n_bytes, 3, (" ", " k", " M", " G", " T", " P", " E"), 1000) + "B"


def format_rate(per_second: Number | None, unit: Literal["FLOP", "B"], digits: int = 4) -> str:
    """FLOP or bytes per second to ``digits`` significant digits.

    >>> format_rate(989.4e12, "FLOP"), format_rate(3.35e12, "B"), format_rate(312e12, "FLOP")
    ('989.4 TFLOP/s', '3.35 TB/s', '312 TFLOP/s')
    """
    if not _finite(per_second):
        return "n/a"
    return _scaled(per_second, digits, (" ", " k", " M", " G", " T", " P", " E"), 1000, strip=True) + f"{unit}/s"


def format_seconds(seconds: Number | None) -> str:
    """A duration in the unit a reader would choose; a year is 365.25 days.

    >>> format_seconds(0.0032), format_seconds(1.25), format_seconds(143.94 * 86400), format_seconds(3.1736e8)
    ('3.2 ms', '1.25 s', '143.9 days', '10.1 years')
    """
    if not _finite(seconds):
        return "n/a"
    value = _decimal(seconds)
    size = abs(value)
    if size >= 2 * SECONDS_PER_YEAR:
        years = value / SECONDS_PER_YEAR
        return f"{years:.1f} years" if abs(years) < 10**6 else f"{_scientific(years, 3)} years"
    for unit, length in (("days", SECONDS_PER_DAY), ("h", 3600), ("min", 60)):
        if size >= 2 * length:
            return f"{value / length:.1f} {unit}"
    if size >= 1 or not size:
        return f"{_plain(_round(value, 3))} s"
    for unit, scale in (("ms", 3), ("µs", 6), ("ns", 9)):
        small = _round(value.scaleb(scale), 3)
        if abs(small) >= 1:
            return f"{_plain(small)} {unit}"
    return f"{_scientific(value, 3)} s"


def format_share(share: Number | None, digits: int = 1) -> str:
    """A fraction as per cent.  What is there but rounds to nothing says so.

    >>> format_share(0.29032, 2), format_share(0.5), format_share(1e-6), format_share(0)
    ('29.03 %', '50.0 %', '<0.1 %', '0.0 %')
    """
    if not _finite(share):
        return "n/a"
    percent = _decimal(share) * 100
    least = Decimal(1).scaleb(-digits)
    if 0 < percent < least / 2:
        return f"<{least} %"
    return f"{percent:.{digits}f} %"


def format_usd(usd: Number | None) -> str:
    """Dollars: cents below a thousand, whole dollars below a million, three significant digits above.

    >>> format_usd(4.2), format_usd(12_345.6), format_usd(8_850_000)
    ('$4.20', '$12,346', '$8.85M')
    """
    if not _finite(usd):
        return "n/a"
    value = _decimal(usd)
    sign, size = ("-" if value < 0 else ""), abs(value)
    if size < Decimal("999.995"):
        return f"{sign}${size:.2f}"
    if size < Decimal("999999.5"):
        return f"{sign}${size:,.0f}"
    return f"{sign}${_scaled(size, 3, ('', 'k', 'M', 'B', 'T'), 1000)}"


def _finite(value: Number | None) -> bool:
    if value is None:
        return False
    if isinstance(value, float):  # before the protocols, which are slow to ask
        return math.isfinite(value)
    if isinstance(value, SupportsIndex):
        return True  # an int of any size is finite, and float() of a large one raises
    return math.isfinite(float(value))


def _decimal(value: Number | Decimal | None) -> Decimal:
    """``value`` as a decimal: an integer exactly, a float by its shortest repr, which is what its writer meant."""
    if isinstance(value, Decimal):
        return value
    if isinstance(value, float):
        return Decimal(repr(float(value)))
    if isinstance(value, SupportsIndex):
        return Decimal(value.__index__())
    if isinstance(value, SupportsFloat):
        return Decimal(repr(float(value)))
    raise TypeError(f"not a number: {value!r}")


def _round(value: Decimal, digits: int) -> Decimal:
    return Context(prec=digits, rounding=ROUND_HALF_EVEN).plus(value)


def _plain(value: Decimal) -> str:
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _scientific(value: Decimal, digits: int, *, strip: bool = True) -> str:
    rounded = _round(value, digits)
    power = rounded.adjusted()
    head = rounded.scaleb(-power)
    return f"{_plain(head) if strip else f'{head:.{digits - 1}f}'}e{power}"


def _scaled(
    value: Number | Decimal | None, digits: int, prefixes: tuple[str, ...], base: int, *, strip: bool = False
) -> str:
    """``value`` over the largest power of ``base`` that leaves at least 1, and that power's prefix.

    Whole numbers below ``base`` stay exact; past the last prefix, and below a thousandth, a power of ten is written.
    """
    exact = _decimal(value)
    if exact == exact.to_integral_value() and abs(exact) < base:
        return f"{int(exact)}{prefixes[0]}"
    if abs(exact) >= Decimal("0.001"):
        for step, prefix in enumerate(prefixes):
            rounded = _round(exact / base**step, digits)
            if abs(exact) < base ** (step + 1) and abs(rounded) < base:
                places = max(0, digits - 1 - rounded.adjusted())  # 5 is written 5.00: the zeros are significant
                return (_plain(rounded) if strip else f"{rounded:.{places}f}") + prefix
    return _scientific(exact, digits, strip=strip) + prefixes[0]
