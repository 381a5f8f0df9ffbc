"""The scoreboard's arithmetic, on forecasts whose errors are known."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

from bursar.errors import BadInput
from bursar.plan import intervals, published, validate
from bursar.report import validate as page
from test_published import GPT

KNOWN = [
    intervals.Errors(
        "step_time", f"other{i}", "small", "before fp8", 10, tuple(math.log(0.8 + 0.02 * q) for q in range(21))
    )
    for i in range(3)
]  # measured / forecast is 0.8 … 1.2, evenly


def runs(table: str, seconds: list[float], **cells: str) -> list[published.Run]:
    return [
        published.run({**GPT, "id": f"{table}:{i}", "table": table, "measured_step_seconds": str(s), **cells})
        for i, s in enumerate(seconds)
    ]


def one_second(job, cluster):
    return SimpleNamespace(seconds=1.0, hardware_flops=0.5 * cluster.peak("bf16"))


def one_gigabyte(job, cluster, rank="worst"):
    return SimpleNamespace(peak_bytes=1e9, reserved_bytes=2e9, device_bytes=3e9, steady_bytes=0.5e9)


def board(rows, others=(), **changes):
    return validate.validate(rows, others, known=KNOWN, **{"time": one_second, "memory": one_gigabyte, **changes})


def line(found, table, target):
    return next(x for x in found.lines if (x.table, x.target) == (table, target))


def test_errors_are_those_of_the_forecast_over_the_measured():
    got = line(board(runs("t", [1.0, 2.0, 0.8])), "t", "step_time")
    assert (got.rows, got.skipped) == (3, 0)
    assert got.mape == pytest.approx((0 + 0.5 + 0.25) / 3)
    assert got.bias == pytest.approx((0 - 0.5 + 0.25) / 3)
    assert got.median == pytest.approx(0.25)
    assert got.within_10 == pytest.approx(1 / 3)


def test_a_scale_comes_from_other_tables_only():
    rows = runs("t", [2.0, 2.0]) + runs("u", [4.0, 4.0])
    got = board(rows)
    assert line(got, "t", "step_time").scaled_mape == pytest.approx(1.0)  # 1 s times u's 4, against 2
    assert line(got, "u", "step_time").scaled_mape == pytest.approx(0.5)  # 1 s times t's 2, against 4


def test_rows_for_calibration_are_not_scored_and_do_set_the_scale():
    rows = runs("t", [2.0, 2.0]) + runs("t", [2.0], role="calibration", id="t:c")
    got = line(board(rows), "t", "step_time")
    assert got.rows == 2
    assert got.scaled_mape == pytest.approx(0.0)


def test_other_runs_set_scales_and_are_not_scored():
    got = board(runs("t", [2.0]), runs("u", [2.0, 2.0]))
    assert [x.table for x in got.lines if x.target == "step_time"] == ["t"]
    assert line(got, "t", "step_time").scaled_mape == pytest.approx(0.0)


def test_the_floor_is_one_constant_hfu_from_the_other_tables():
    rows = runs("t", [1.0, 2.0]) + runs("u", [1.0])
    got = line(board(rows), "t", "step_time")  # 0.5 s at HFU 1; u says HFU 0.5: 1 s
    assert got.floor_mape == pytest.approx((0 + 0.5) / 2)


def test_a_run_that_is_faster_than_dense_peak_allows_is_flagged():
    got = board(runs("t", [0.4, 0.6]))  # the FLOPs take 0.5 s at dense peak
    assert line(got, "t", "step_time").impossible == 1
    assert any("Faster than dense peak allows" in text and "t 1" in text for text in page._legend(got))
    assert not any("Faster" in text for text in page._legend(board(runs("t", [0.6]))))


def test_a_row_that_could_be_scored_and_is_not_counts_as_wholly_wrong():
    rows = runs("t", [1.0]) + runs("t", [1.0], id="t:a", gpu="abacus") + runs("t", [1.0], id="t:n", flags="no_shape")
    got = line(board(rows), "t", "step_time")
    assert (got.rows, got.skipped) == (1, 2)
    assert got.mape == pytest.approx(0.0)
    assert got.mape_with_skipped == pytest.approx(0.5)


def test_a_forecast_that_fails_is_a_skipped_row_with_its_reason():
    def refuse(job, cluster):
        raise BadInput("no such layout")

    got = line(board(runs("t", [1.0]), time=refuse), "t", "step_time")
    assert got.reasons == {"no such layout": 1}
    assert got.mape_with_skipped == 1.0


@pytest.mark.parametrize(("kind", "asked"), [("allocated", 1e9), ("reserved", 2e9), ("nvidia_smi", 3e9)])
def test_the_peak_is_of_the_kind_that_the_source_read(kind, asked):
    rows = runs("t", [1.0], measured_peak_bytes=str(asked), peak_kind=kind)
    assert line(board(rows), "t", "peak_memory").mape == pytest.approx(0.0)


def test_the_last_ranks_peak_is_asked_of_the_last_rank():
    asked = []

    def memory(job, cluster, rank="worst"):
        asked.append(rank)
        return one_gigabyte(job, cluster)

    board(runs("t", [1.0], measured_peak_bytes="1e9", flags="last_rank_only"), memory=memory)
    assert asked[0] == "last"


def test_out_of_memory_runs_are_counted_when_caught():
    def by_stage(job, cluster, rank="worst"):
        return SimpleNamespace(
            **{**vars(one_gigabyte(job, cluster)), "device_bytes": 9e10 if job.layout.pp == 1 else 1e9}
        )

    rows = runs("t", [1.0]) + runs("t", [1.0, 1.0], fits="0", pp="1", dp="4")
    rows += runs("t", [1.0], fits="0", id="t:x")
    got = line(board(rows, memory=by_stage), "t", "fits")
    assert (got.oom_rows, got.oom_caught) == (3, 2)
    assert got.within_10 == pytest.approx(3 / 4)


def test_ranking_is_kendalls_tau_and_what_the_choice_costs():
    def by_micro_batch(job, cluster):
        return SimpleNamespace(seconds={1: 3.0, 2: 1.0, 4: 2.0}[job.micro_batch], hardware_flops=1e12)

    sizes = [("1", "4", 5.0), ("2", "2", 2.0), ("4", "1", 1.0)]  # one model, one batch of 8, three micro-batches
    rows = [r for m, a, s in sizes for r in runs("t", [s], id=f"t:{m}", micro_batch=m, grad_accumulation=a)]
    got = line(board(rows, time=by_micro_batch), "t", "ranking")
    assert got.kendall_tau == pytest.approx(1 / 3)  # of three pairs, two are in order
    assert got.regret == pytest.approx(1.0)  # it chooses 2 s where 1 s is to be had


def test_an_interval_covers_four_fifths_of_errors_like_those_it_learned_from():
    rows = runs("t", [0.8 + 0.02 * q + 0.001 for q in range(21)])
    got = line(board(rows), "t", "step_time")
    assert got.coverage_80 == pytest.approx(0.8, abs=0.06)


def test_tables_that_disagree_widen_the_interval_though_each_is_narrow():
    job, cluster = published.run(GPT).job, published.run(GPT).cluster

    def tables(*middles: float) -> list[intervals.Errors]:
        return [
            intervals.Errors("step_time", f"o{i}", "small", "before fp8", 10, (m,) * 21) for i, m in enumerate(middles)
        ]

    agree = intervals.factors(job, cluster, "step_time", "", tables(0.1, 0.1))
    assert (agree.low, agree.high) == pytest.approx((math.exp(-0.02), math.exp(0.12)))
    apart = intervals.factors(job, cluster, "step_time", "", tables(0.0, 0.2))  # 0.1 ± 1.28 · √(0.02 · 3/2)
    assert math.log(apart.high) == pytest.approx(0.1 + 1.2816 * math.sqrt(0.02 * 1.5))


def test_a_kind_that_no_table_has_gets_a_wider_interval():
    job, cluster = published.run(GPT).job, published.run(GPT).cluster
    other = [intervals.Errors(**{**{f: getattr(e, f) for f in e.__slots__}, "kind": "mixture"}) for e in KNOWN]
    known = intervals.factors(job, cluster, "step_time", "", KNOWN)
    unknown = intervals.factors(job, cluster, "step_time", "", other)
    assert unknown.high / unknown.low > known.high / known.low


def test_an_interval_never_learns_from_the_table_it_is_scored_on():
    mine = intervals.Errors("step_time", "t", "small", "before fp8", 99, (0.0,) * 21)
    job, cluster = published.run(GPT).job, published.run(GPT).cluster
    with_it = intervals.factors(job, cluster, "step_time", "t", [*KNOWN, mine])
    assert with_it == intervals.factors(job, cluster, "step_time", "", KNOWN)
    assert with_it != intervals.factors(job, cluster, "step_time", "", [*KNOWN, mine])


def test_a_wide_interval_and_a_miss_both_cost():
    f = validate.Forecast(published.run(GPT), "step_time", 1.0, 1.0, low=0.5, high=1.5)
    assert validate._winkler(f) == pytest.approx(1.0)
    miss = validate.Forecast(published.run(GPT), "step_time", 1.0, 1.0, low=1.1, high=1.2)
    assert validate._winkler(miss) == pytest.approx(0.1 + 0.1 * 10)


def test_errors_are_written_and_read_back():
    import tomllib

    rows = tomllib.loads(intervals.as_toml(KNOWN))["errors"]
    assert [r["table"] for r in rows] == ["other0", "other1", "other2"]
    assert rows[0]["log_errors"] == pytest.approx(KNOWN[0].log_errors, rel=1e-3)


def test_the_record_has_the_contracts_fields_and_is_strict_json():
    record = page.record(board(runs("t", [1.0, 2.0])))
    assert {"table", "target", "rows", "skipped", "mape", "median", "p90", "bias", "within_10", "coverage_80",
            "scaled_mape", "floor_mape"} <= set(record["tables"][0])  # fmt: skip
    json.dumps(record, allow_nan=False)
