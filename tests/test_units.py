import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar.errors import BadInput
from bursar.units import (
    format_bytes,
    format_count,
    format_flops,
    format_rate,
    format_seconds,
    format_share,
    format_usd,
    parse_bytes,
    parse_count,
    parse_rate,
    parse_seconds,
)

finite = st.floats(min_value=1e-12, max_value=1e30, allow_nan=False)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("15T", 15 * 10**12), ("70B", 70 * 10**9), ("16M", 16 * 10**6), ("400K", 400_000), ("400k", 400_000),
        ("1e13", 10**13), ("1.5e3", 1500), ("15_000", 15_000), ("2P", 2 * 10**15), ("1E", 10**18), (" 7 B ", 7 * 10**9),
        ("174.6b", 174_600_000_000), ("0", 0), (15, 15), (1e13, 10**13),
    ],
)  # fmt: skip
def test_a_count_is_read_exactly(text: str | float, count: int) -> None:
    assert parse_count(text) == count
    assert type(parse_count(text)) is int


def test_a_thirty_digit_count_keeps_every_digit() -> None:
    assert parse_count("123456789012345678901234567891") == 123456789012345678901234567891


def test_gigabytes_and_gibibytes_are_never_mixed() -> None:
    assert parse_bytes("80GB") == 80 * 10**9
    assert parse_bytes("80GiB") == 80 * 2**30
    assert parse_bytes("512 MB") == 512 * 10**6
    assert parse_bytes("81559MiB") == 85_520_809_984  # what an 80 GB H100 shows


@pytest.mark.parametrize("bits", ["80Gb", "80Gbit", "80Gib", "80G", "80", "80 gigabytes"])
def test_bits_and_bare_numbers_are_not_taken_for_bytes(bits: str) -> None:
    with pytest.raises(BadInput, match="such as 80GB"):
        parse_bytes(bits)


def test_rates_are_read_in_bytes_or_flop_and_one_can_be_asked_for() -> None:
    assert parse_rate("3.35TB/s", of="bytes") == 3.35e12
    assert parse_rate("989.4 TFLOP/s", of="flops") == 989.4e12
    assert parse_rate("312 TFLOPS") == parse_rate("312 TFLOPs/s") == 312e12
    with pytest.raises(BadInput, match="it counts bytes, and flops are asked for"):
        parse_rate("3.35TB/s", of="flops")


def test_durations_use_a_year_of_365_and_a_quarter_days() -> None:
    assert parse_seconds("144 days") == 144 * 86_400
    assert parse_seconds("1.5y") == 1.5 * 365.25 * 86_400
    assert parse_seconds("2w") == 14 * 86_400
    assert parse_seconds("3h") == 10_800
    assert parse_seconds("250 ms") == 0.25


@pytest.mark.parametrize("parse", [parse_count, parse_bytes, parse_rate, parse_seconds])
@pytest.mark.parametrize(
    "bad",
    [
        "", " ", "-5", "-5GB", "−3h", "nan", "inf", "many", "1.2.3", "1__0", "٣", "5 apples", "9" * 81,
        True, -1, math.nan, math.inf,
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_an_example_of_what_can(parse, bad) -> None:
    with pytest.raises(BadInput, match=r"cannot read .* as a .*; give .* such as"):
        parse(bad)


def test_a_fraction_of_a_thing_is_not_a_count() -> None:
    with pytest.raises(BadInput, match="it is not whole"):
        parse_count("1.5")


def test_an_exponent_cannot_ask_for_a_billion_digits() -> None:
    with pytest.raises(BadInput):
        parse_count("1e999999999")
    with pytest.raises(BadInput, match="too large"):
        parse_rate("1e999 B/s")


@pytest.mark.parametrize(
    ("text", "written"),
    [
        (format_count(15 * 10**12), "15T"), (format_count(6.3e24), "6.3e24"), (format_count(496), "496"),
        (format_flops(432), "432 FLOP"), (format_flops(2**43), "8.80 TFLOP"), (format_flops(6.3e24), "6.30e24 FLOP"),
        (format_flops(999.6e9), "1.00 TFLOP"), (format_bytes(496), "496 B"), (format_bytes(80 * 10**9), "80.0 GB"),
        (format_bytes(2**30, binary=True), "1.00 GiB"), (format_bytes(1023 * 1024, binary=True), "1020 KiB"),
        (format_rate(989.4e12, "FLOP"), "989.4 TFLOP/s"), (format_rate(3.35e12, "B"), "3.35 TB/s"),
        (format_seconds(12_436_000), "143.9 days"), (format_seconds(1.25), "1.25 s"),
        (format_seconds(0.0032), "3.2 ms"), (format_seconds(10.0567 * 31_557_600), "10.1 years"),
        (format_seconds(0), "0 s"),
        (format_share(0.129032, 2), "12.90 %"), (format_usd(0), "$0.00"), (format_usd(999.999), "$1,000"),
    ],
)  # fmt: skip
def test_quantities_are_written_for_a_reader(text: str, written: str) -> None:
    assert text == written


@pytest.mark.parametrize("nothing", [math.nan, math.inf, -math.inf, None])
def test_what_is_not_a_finite_number_is_written_as_not_available(nothing: float | None) -> None:
    for write in (format_count, format_flops, format_bytes, format_seconds, format_share, format_usd):
        assert write(nothing) == "n/a"
    assert format_rate(nothing, "B") == "n/a"


@given(st.integers(min_value=0, max_value=10**40))
def test_a_written_out_integer_reads_back_exactly(n: int) -> None:
    assert parse_count(str(n)) == parse_count(n) == n
    assert parse_bytes(f"{n}B") == n


@given(st.integers(min_value=0, max_value=999))
def test_small_whole_numbers_are_written_exactly(n: int) -> None:
    assert format_count(n) == str(n)
    assert format_flops(n) == f"{n} FLOP"
    assert format_bytes(n) == f"{n} B"


@given(st.integers(min_value=1000, max_value=10**30))
def test_a_formatted_count_reads_back_within_its_three_digits(n: int) -> None:
    assert parse_count(format_count(n)) == pytest.approx(n, rel=5e-3)


@given(st.integers(min_value=1, max_value=10**17), st.booleans())
def test_formatted_bytes_read_back_within_their_three_digits(n: int, binary: bool) -> None:
    assert parse_bytes(format_bytes(n, binary=binary)) == pytest.approx(n, rel=5e-3, abs=1)


@given(finite.filter(lambda x: x >= 1e-3))
def test_a_formatted_rate_reads_back_within_its_four_digits(rate: float) -> None:
    assert parse_rate(format_rate(rate, "FLOP")) == pytest.approx(rate, rel=5e-4)
    assert parse_rate(format_rate(rate, "B")) == pytest.approx(rate, rel=5e-4)


@given(finite)
def test_a_formatted_duration_reads_back_within_half_a_tenth_of_its_unit(seconds: float) -> None:
    assert parse_seconds(format_seconds(seconds)) == pytest.approx(seconds, rel=0.05 / 2 + 1e-9)


@given(st.floats())
def test_no_float_makes_a_formatter_fail(x: float) -> None:
    for write in (format_count, format_flops, format_bytes, format_seconds, format_share, format_usd):
        assert write(x)
