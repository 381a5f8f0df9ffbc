import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar.errors import BadInput, BursarError, NoAnswer, UnknownName
from bursar.hardware import accelerator, cluster
from bursar.run import Run, batch_slip, magnitude, magnitudes, solve

DAY = 86_400
H100 = 989.4e12  # bf16, dense


# the notes' figures


def test_70b_parameters_on_15t_tokens_take_6_3e24_flop() -> None:
    run = solve(parameters="70B", tokens="15T", on="1024xh100-sxm", mfu=0.5)
    assert run.flops == 6 * 70 * 10**9 * 15 * 10**12 == 63 * 10**23


def test_1024_h100_at_half_their_peak_train_it_in_143_9_days() -> None:
    run = solve(parameters=70e9, tokens=15e12, on="1024xh100-sxm", mfu=0.5)
    assert run.solved == "seconds"
    assert run.days == pytest.approx(6.3e24 / (1024 * H100 * 0.5) / DAY)
    assert round(run.days, 2) == 143.94
    assert round(solve(parameters=70e9, tokens=15e12, gpus=1024, peak_flops_per_s=989.5e12, mfu=0.5).days, 2) == 143.93


def test_6_3e24_is_twenty_times_gpt3_not_its_match() -> None:
    assert 6.3e24 / magnitude("gpt3").flops == pytest.approx(20.06, abs=0.01)


@pytest.mark.parametrize(("name", "years"), [("gpt3", "10.1"), ("gpt4-rumour", "641"), ("us-1e26", "3203")])
def test_years_on_a_single_h100_at_its_whole_peak(name: str, years: str) -> None:
    run = solve(flops=name, on="h100-sxm", mfu=1.0)
    assert f"{run.years:.{1 if '.' in years else 0}f}" == years  # years of 365.25 days
    assert solve(flops=name, on="h100-sxm", mfu=0.5).years == pytest.approx(2 * run.years)
    assert run.gpus == 1
    assert "one h100-sxm, as no number and no time was given" in run.assumptions


def test_the_courses_gpt2_xl_takes_6583_6_days_of_one_a100_in_fp32() -> None:
    forward = 4_513_336_524_800  # one sequence of 1024 tokens, F 6400, full-square attention
    training = 3 * forward * 1024 * 400_000  # backward is twice forward; batch 1024; 400K steps
    run = solve(flops=training, on="1xa100-80g-sxm", mfu=0.5, dtype="fp32")
    assert run.peak_flops_per_s == 19.5e12
    assert round(run.days, 1) == 6583.6


# magnitudes


def test_a_magnitude_carries_its_status_into_the_assumptions() -> None:
    assert {m.name: m.flops for m in magnitudes()} == {
        "gpt3": 3.14e23, "gpt4-rumour": 2e25, "us-1e26": 1e26, "eu-1e25": 1e25,
    }  # fmt: skip
    assert {m.status for m in magnitudes()} == {"published", "rumour", "revoked", "law"}
    assert all(m.source for m in magnitudes())
    assert any("rumour" in note for note in solve(flops="gpt4-rumour", on="h100-sxm", mfu=1).assumptions)


def test_flops_may_be_a_plain_value() -> None:
    assert solve(flops="3.14e23", on="h100-sxm", mfu=1).flops == 314 * 10**21  # exact, as it was written
    assert solve(flops=3.14e23, on="h100-sxm", mfu=1).flops == 3.14e23


def test_an_unknown_magnitude_names_the_near_ones() -> None:
    with pytest.raises(UnknownName, match=r"did you mean gpt4-rumour\? Give a value"):
        solve(flops="gpt4", on="h100-sxm")


# each part solved from the rest


def test_every_part_is_recovered_from_the_others() -> None:
    whole = {"parameters": 7_000_000_000, "tokens": 10**12, "gpus": 256, "mfu": 0.4}
    seconds = solve(on="h100-sxm", **whole).seconds
    assert seconds == pytest.approx(6 * 7e9 * 1e12 / (256 * H100 * 0.4))
    for missing in whole:
        rest = {name: value for name, value in whole.items() if name != missing}
        run = solve(on="h100-sxm", seconds=seconds, **rest)
        assert run.solved == missing
        assert getattr(run, missing) == pytest.approx(whole[missing], rel=1e-9)


def test_flops_are_solved_when_no_work_is_named() -> None:
    run = solve(on="8xh100-sxm", mfu=0.5, days=1)
    assert (run.solved, run.tokens, run.parameters) == ("flops", None, None)
    assert run.flops == pytest.approx(8 * H100 * 0.5 * DAY)


def test_tokens_follow_from_flops_and_parameters() -> None:
    assert solve(flops=6.3e24, parameters="70B", on="1024xh100-sxm").tokens == pytest.approx(15e12, abs=1)


def test_tokens_may_be_a_batch_a_length_and_a_number_of_steps() -> None:
    run = solve(parameters="1.5B", batch=1024, seq_len=1024, steps="400K", on="h100-sxm")
    assert run.tokens == 1024 * 1024 * 400_000


def test_a_number_of_accelerators_is_rounded_up_to_a_whole_one_and_the_time_follows() -> None:
    run = solve(parameters="70B", tokens="15T", on="h100-sxm", mfu=0.5, days=144)
    exact = 6.3e24 / (H100 * 0.5 * 144 * DAY)  # 1023.6
    assert run.gpus == math.ceil(exact) == 1024
    assert run.days < 144
    assert any("rounded up to 1024" in note for note in run.assumptions)


def test_a_whole_number_of_accelerators_is_not_rounded_to_the_next() -> None:
    days = solve(parameters="7B", tokens="1T", on="3xh100-sxm", mfu=0.4).days
    assert solve(parameters="7B", tokens="1T", on="h100-sxm", mfu=0.4, days=days).gpus == 3


def test_an_mfu_of_a_half_is_assumed_for_time_and_number_and_said() -> None:
    for rest in ({"on": "8xh100-sxm"}, {"on": "h100-sxm", "days": 30}):
        run = solve(parameters="7B", tokens="1T", **rest)
        assert run.mfu == 0.5
        assert "MFU 0.5 assumed, as none was given" in run.assumptions
    given = solve(parameters="7B", tokens="1T", on="8xh100-sxm", mfu=0.5)
    assert not any("MFU" in note for note in given.assumptions)


def test_the_peak_follows_the_dtype() -> None:
    bf16, fp32 = (solve(flops="gpt3", on="a100-80g-sxm", dtype=dtype).seconds for dtype in ("bf16", "fp32"))
    assert fp32 / bf16 == pytest.approx(16)


# money and energy


def test_money_is_hours_times_price_and_unknown_without_a_price() -> None:
    run = solve(parameters="7B", tokens="1T", on="256xh100-sxm", mfu=0.4, usd_per_gpu_hour=2.5)
    assert run.usd == pytest.approx(run.gpu_hours * 2.5)
    assert run.gpu_hours == pytest.approx(6 * 7e9 * 1e12 / (H100 * 0.4) / 3600)
    assert solve(parameters="7B", tokens="1T", on="256xmi300x", mfu=0.4).usd is None
    catalogue = solve(parameters="7B", tokens="1T", on="256xh100-sxm", mfu=0.4)
    assert catalogue.usd == pytest.approx(catalogue.gpu_hours * accelerator("h100-sxm").usd_per_gpu_hour)
    assert any("per GPU-hour, lambda.ai" in note for note in catalogue.assumptions)  # with whose price, and when


def test_energy_is_board_power_times_time_times_pue() -> None:
    run = solve(flops="gpt3", on="1024xh100-sxm", mfu=0.5)
    assert run.kwh == pytest.approx(1024 * 0.7 * run.seconds / 3600)  # 700 W
    assert any("PUE 1.0 assumed" in note for note in run.assumptions)
    assert solve(flops="gpt3", on="1024xh100-sxm", mfu=0.5, pue=1.2).kwh == pytest.approx(1.2 * run.kwh)
    assert solve(flops="gpt3", gpus=1024, peak_flops_per_s=H100, mfu=0.5).kwh is None
    assert solve(flops="gpt3", on="tpu-v4", mfu=0.5).kwh is None  # no published power
    with pytest.raises(BadInput, match="pue"):
        solve(flops="gpt3", on="h100-sxm", pue=0.9)


def test_a_budget_is_spent_in_full_where_it_settles_what_is_missing() -> None:
    spend = {"budget_usd": 1e6, "usd_per_gpu_hour": 2.0}  # 500 000 GPU-hours
    tokens = solve(parameters="7B", on="256xh100-sxm", mfu=0.4, **spend)
    assert tokens.solved == "tokens"
    assert tokens.tokens == pytest.approx(500_000 * 3600 * H100 * 0.4 / (6 * 7e9))
    needed = solve(parameters="7B", tokens="10T", on="256xh100-sxm", **spend)
    assert needed.solved == "mfu"
    assert needed.mfu == pytest.approx(6 * 7e9 * 10e12 / (500_000 * 3600 * H100))
    number = solve(parameters="7B", on="h100-sxm", mfu=0.4, days=30, **spend)
    assert number.gpus == 500_000 // (30 * 24) == 694
    assert number.usd is not None
    assert number.usd <= 1e6


def test_a_budget_is_a_ceiling_where_nothing_is_missing() -> None:
    whole = {"parameters": "70B", "tokens": "15T", "on": "1024xh100-sxm", "mfu": 0.5, "usd_per_gpu_hour": 2.0}
    cost = solve(**whole).usd  # 143.94 days of 1024 at 2 dollars: 7.07 million
    assert cost == pytest.approx(143.94 * 24 * 1024 * 2, rel=1e-4)
    assert solve(**whole, budget_usd=8e6).usd == cost
    with pytest.raises(NoAnswer, match=r"over budget: 1024 accelerators for 143\.9 days cost \$7\.07M"):
        solve(**whole, budget_usd=5e6)


def test_a_budget_without_a_price_is_refused() -> None:
    with pytest.raises(BadInput, match="give usd_per_gpu_hour"):
        solve(parameters="7B", tokens="1T", on="8xmi300x", budget_usd=1e6)


def test_a_budget_below_one_accelerator_has_no_answer() -> None:
    with pytest.raises(NoAnswer, match="less than one"):
        solve(parameters="7B", on="h100-sxm", mfu=0.4, days=30, budget_usd=10, usd_per_gpu_hour=2)


# what cannot be answered


def test_an_mfu_above_one_is_impossible_and_named() -> None:
    with pytest.raises(NoAnswer, match=r"impossible: an MFU of 1\.2 is asked for") as raised:
        solve(parameters="7B", tokens="1T", on="8xh100-sxm", mfu=1.2)
    assert raised.value.exit_code == 1
    with pytest.raises(NoAnswer, match=r"impossible: an MFU of 9\.\d+ would be needed to do 4\.2e\+22 FLOP"):
        solve(parameters="7B", tokens="1T", on="52xh100-sxm", days=1)


def test_an_mfu_of_exactly_one_is_allowed() -> None:
    assert solve(flops="gpt3", on="h100-sxm", mfu=1).mfu == 1


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (
            {"parameters": "7B", "tokens": "1T", "on": "8xl4", "mfu": 0.4, "days": 3},
            "given: parameters, tokens, gpus, mfu, time",
        ),
        ({"flops": 1e20, "parameters": "7B", "tokens": "1T", "on": "8xl4"}, "given: flops, parameters, tokens"),
        ({"flops": 1e20, "on": "8xl4", "gpus": 4}, "given twice"),
        ({"flops": 1e20, "on": "8xl4", "days": 1, "seconds": 5}, "given twice"),
        ({"parameters": "7B", "tokens": "1T", "batch": 8, "seq_len": 8, "steps": 8, "on": "l4"}, "given twice"),
    ],
)  # fmt: skip
def test_too_much_says_what_is_given_and_what_to_drop(request_, says: str) -> None:
    with pytest.raises(BadInput, match=says) as raised:
        solve(**request_)
    assert "drop one" in str(raised.value)


def test_tokens_are_solved_at_an_assumed_mfu_when_none_is_given():
    answer = solve(parameters="7B", on="8xl4", days=3)
    assert answer.solved == "tokens"
    assert answer.tokens == int(8 * 121e12 * 0.5 * 3 * 86400 / (6 * 7e9))
    assert any("MFU 0.5 assumed" in note for note in answer.assumptions)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"parameters": "7B", "on": "8xl4", "mfu": 0.4}, "given: parameters, gpus, mfu; add .* or all of time"),
        ({"on": "8xl4"}, "given: gpus; add"),
        ({"flops": 1e20, "peak_flops_per_s": 1e12}, "given: flops; add gpus or a time"),
        ({"flops": 1e20, "gpus": 8}, "no peak: name an accelerator"),
        ({"parameters": "7B", "batch": 8, "on": "l4"}, "give both"),
        ({"parameters": "7B", "batch": 8, "seq_len": 8, "on": "l4"}, "all three"),
    ],
)  # fmt: skip
def test_too_little_says_what_is_given_and_what_to_add(request_, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        solve(**request_)


@pytest.mark.parametrize(
    "part",
    [
        "flops", "parameters", "tokens", "gpus", "mfu", "seconds", "days", "budget_usd", "usd_per_gpu_hour",
        "peak_flops_per_s", "pue",
    ],
)  # fmt: skip
@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf, True, 1e70])
def test_zero_negative_and_not_a_number_are_refused_at_once(part: str, bad: float) -> None:
    request_ = {"on": "l4", "usd_per_gpu_hour": 1.0} | {part: bad}
    if part == "peak_flops_per_s":
        del request_["on"]
    with pytest.raises(BadInput):
        solve(**request_)


# the slip


def test_a_batch_in_tokens_times_the_sequence_again_is_noticed() -> None:
    # the notes' GPT-3 step: 4M is already tokens, and 4M x 2048 of them is 8.2e9
    run = solve(parameters="175B", batch="4M", seq_len=2048, steps=100, on="1024xh100-sxm")
    assert run.warnings == (batch_slip(4_000_000, 2048),)
    assert "8.19B tokens; if 4M is already in tokens, it is 1.95k sequences" in run.warnings[0]


def test_an_ordinary_batch_is_not() -> None:
    assert batch_slip(1536, 2048) is None
    assert solve(parameters="1B", batch=1024, seq_len=1024, steps=10, on="l4").warnings == ()


# the record


def test_the_record_has_the_fields_of_the_json() -> None:
    record = solve(parameters="70B", tokens="15T", on="1024xh100-sxm").record()
    fields = {
        "flops",
        "tokens",
        "parameters",
        "gpus",
        "mfu",
        "seconds",
        "days",
        "gpu_hours",
        "usd",
        "kwh",
        "assumptions",
    }
    assert fields <= set(record)
    assert record["days"] == record["seconds"] / DAY
    assert record["gpu_hours"] == 1024 * record["seconds"] / 3600


def test_an_accelerator_and_a_cluster_may_be_given_as_records() -> None:
    named = solve(flops="gpt3", on="8xl4", mfu=0.5)
    assert solve(flops="gpt3", on=cluster("8xl4"), mfu=0.5) == named
    assert solve(flops="gpt3", on=accelerator("l4"), gpus=8, mfu=0.5) == named


@given(
    parameters=st.integers(1, 10**13),
    tokens=st.integers(1, 10**15),
    gpus=st.integers(1, 10**6),
    mfu=st.floats(1e-3, 1),
)
def test_the_equation_balances(parameters: int, tokens: int, gpus: int, mfu: float) -> None:
    run = solve(parameters=parameters, tokens=tokens, gpus=gpus, mfu=mfu, on="h100-sxm")
    done = Fraction(run.gpus) * Fraction(run.peak_flops_per_s) * Fraction(run.mfu) * Fraction(run.seconds)
    assert float(done / (6 * parameters * tokens)) == pytest.approx(1, rel=1e-12)


@given(
    flops=st.none() | st.floats(),
    parameters=st.none() | st.floats(),
    tokens=st.none() | st.integers(),
    gpus=st.none() | st.integers(),
    mfu=st.none() | st.floats(),
    seconds=st.none() | st.floats(),
    budget_usd=st.none() | st.floats(),
    usd_per_gpu_hour=st.none() | st.floats(),
)
def test_any_input_is_answered_with_finite_figures_or_refused_on_purpose(**parts) -> None:
    try:
        run: Run | None = solve(on="h100-sxm", **parts)
    except BursarError:  # anything else would escape, and fail
        run = None
    if run is not None:
        assert all(
            math.isfinite(x) for x in (run.flops, run.mfu, run.seconds, run.gpu_hours, run.usd or 0, run.kwh or 0)
        )
