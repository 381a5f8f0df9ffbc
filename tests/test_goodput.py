"""What failures leave of a run, against the papers' figures and a simulation; what compute is best spent on."""

from __future__ import annotations

import json
import math
import random

import pytest

from bursar.errors import BadInput, NoAnswer
from bursar.goodput import FAILURES_PER_GPU_HOUR, best_interval, goodput
from bursar.run import solve
from bursar.scaling import TABLE_3, loss, optimal
from command import ask


def test_llama_3_kept_more_than_nine_tenths_of_its_time():
    # Dubey et al. 2024, 3.3.4: 54 days of 16 384 H100, 419 unexpected interruptions, "higher than 90% effective"
    run = goodput(54 * 86400, 16_384, 405_000_000_000)
    assert 0.90 < run.share < 0.95
    assert run.interruptions == pytest.approx(419 / run.share)
    assert run.mtbf_seconds / 3600 == pytest.approx(54 * 24 / 419)


def test_the_wall_time_is_what_a_simulation_of_failures_takes():
    draw = random.Random(0)
    mtbf, delta, restart, tau = 3600.0, 120.0, 300.0, 900.0
    work = 400 * tau

    def failing() -> float:
        """Seconds until a span of ``need`` without a failure: each failure costs what was done and a restart."""
        clock = 0.0
        for _ in range(400):
            need = tau + delta
            while True:
                until = draw.expovariate(1 / mtbf)
                if until >= need:
                    clock += need
                    break
                clock += until
                need = restart + tau + delta
        return clock

    simulated = sum(failing() for _ in range(20)) / 20
    rate = 3600 / mtbf
    found = goodput(work, 1, failures_per_gpu_hour=rate, checkpoint_seconds=delta, interval_seconds=tau,
                    restart_seconds=restart)  # fmt: skip
    # Daly's closed form lets a failure during restart pass for one restart more, so it is an upper bound close by
    assert simulated == pytest.approx(found.wall_seconds, rel=0.05)


@pytest.mark.parametrize(("delta", "mtbf"), [(10, 36_000), (60, 10_800), (300, 7_200)])
def test_no_other_interval_keeps_more_than_the_best(delta, mtbf):
    def share(tau: float) -> float:
        return goodput(1e6, 1, failures_per_gpu_hour=3600 / mtbf, checkpoint_seconds=delta, interval_seconds=tau,
                       restart_seconds=60).share  # fmt: skip

    best = best_interval(delta, mtbf)
    assert share(best) >= max(share(best * x) for x in (0.7, 0.85, 1.15, 1.4)) - 1e-5


def test_rare_failures_want_youngs_interval():
    assert best_interval(1, 1e9) == pytest.approx(math.sqrt(2e9), rel=1e-3)


def test_without_failures_nothing_is_lost():
    assert goodput(1e6, 8, 10**9, failures_per_gpu_hour=0).share == 1.0


def test_more_devices_fail_more_often():
    shares = [goodput(1e6, n, 70 * 10**9, checkpoint_seconds=60).share for n in (64, 1024, 16_384)]
    assert shares == sorted(shares, reverse=True)


def test_figures_that_cannot_be_are_refused_and_a_run_that_never_ends_is_no():
    with pytest.raises(BadInput, match="checkpoint_seconds is 0; give a number above zero"):
        goodput(1e6, 8, checkpoint_seconds=0)
    with pytest.raises(NoAnswer, match="would not end"):
        goodput(1e6, 10**6, failures_per_gpu_hour=10, checkpoint_seconds=60)


@pytest.mark.parametrize(("parameters", "tokens", "flops"), TABLE_3)
def test_the_best_split_is_the_table_of_hoffmann_et_al(parameters, tokens, flops):
    found = optimal(flops)
    assert found.parameters == pytest.approx(parameters, rel=0.05)  # their FLOP are not 6ND to the last percent
    assert found.tokens == pytest.approx(tokens, rel=0.05)
    assert 6 * found.parameters * found.tokens == pytest.approx(flops)


def test_no_other_split_of_the_same_compute_has_less_loss_by_the_refit():
    found = optimal(5.76e23)
    best = loss(found.refit_parameters, found.refit_tokens)
    for factor in (0.5, 0.9, 1.1, 2):
        assert loss(found.refit_parameters * factor, found.refit_tokens / factor) > best


def test_run_says_steps_goodput_split_and_thresholds(capsys):
    argv = ["run", "--params", "405B", "--tokens", "15.6T", "--on", "16384xh100-sxm", "--mfu", "0.41"]
    code, out, _ = ask(capsys, *argv, "--batch-tokens", "16M", "--goodput", "--optimal", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["steps"] == 975_000  # 15.6e12 / 16e6
    assert found["step_seconds"] * found["steps"] == pytest.approx(found["seconds"])
    assert found["goodput"]["wall_days"] > found["days"]
    assert found["optimal"]["parameters"] * found["optimal"]["tokens"] * 6 == pytest.approx(found["flops"])
    reached = {t["name"]: t["reached"] for t in found["thresholds"]}
    assert reached == {"us-1e26": False, "eu-1e25": True}
    code, page, _ = ask(capsys, *argv, "--goodput", "--optimal")
    assert code == 0
    assert "Reaches eu-1e25" in page
    assert "of the wall time is kept work" in page


def test_a_failure_rate_without_goodput_is_refused(capsys):
    code, _, err = ask(capsys, "run", "--flops", "gpt3", "--on", "h100-sxm", "--checkpoint-seconds", "60")
    assert code == 2
    assert "go with --goodput" in err


def test_steps_are_unknown_where_nothing_says_a_steps_tokens():
    assert solve(flops="gpt3", on="h100-sxm").steps is None
    assert pytest.approx(1.97e-5, rel=0.01) == FAILURES_PER_GPU_HOUR
