"""Forecasts scored on published runs: each row from its configuration alone, then errors per table and target.

Two columns of errors: as forecast, and after one scale per GPU type, the median of measured / forecast on the *other*
tables (and on rows that are there for calibration). Beside them the floor: hardware FLOPs at one constant HFU per GPU
type, learned from the other tables likewise. Nothing of a table is used to forecast it.
"""

from __future__ import annotations

import math
import statistics
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from itertools import combinations
from typing import Any

import numpy as np

from bursar.efficiency import product_dtype
from bursar.errors import BursarError
from bursar.plan.intervals import COVERAGE, Errors, factors, generation, kind, learn
from bursar.plan.published import Run
from bursar.rank_memory import RankMemory, rank_memory
from bursar.step_time import StepTime, step_time

TARGETS = ("step_time", "peak_memory", "steady_memory", "fits", "ranking")
EXCUSED = ("flag no_shape", "flag impossible")  # the only rows that need not be forecast
WITHIN = 0.1
LEAST_TO_RANK = 3  # layouts of one model on one cluster: two are a coin's toss


@dataclass(frozen=True, slots=True)
class Forecast:
    """One figure of one published run, forecast and measured."""

    run: Run
    target: str
    measured: float
    predicted: float
    floor: float = math.nan  # step_time: seconds at an HFU of one
    low: float = math.nan  # the 80 % interval
    high: float = math.nan
    scale: float = 1.0  # of the GPU type, from other tables
    floor_scale: float = math.nan

    @property
    def log_error(self) -> float:
        """log(measured / predicted)."""
        return math.log(self.measured / self.predicted)


@dataclass(frozen=True, slots=True)
class Line:
    """One table and target of the scoreboard. Errors are fractions; None where nothing can be said."""

    table: str
    target: str
    rows: int
    skipped: int
    mape: float | None = None
    median: float | None = None
    p90: float | None = None
    bias: float | None = None
    within_10: float | None = None
    coverage_80: float | None = None
    scaled_mape: float | None = None
    floor_mape: float | None = None
    winkler: float | None = None  # mean interval score over the measured figure; wide intervals and misses both cost
    mape_with_skipped: float | None = None  # a row that could be scored and was not counts as 100 %
    reasons: dict[str, int] = field(default_factory=dict)
    kendall_tau: float | None = None  # ranking: between forecast and measured order, the mean over groups
    regret: float | None = None  # ranking: what the layout forecast to be best costs over the best, the mean
    oom_rows: int | None = None  # fits: runs that were out of memory, and those of them forecast so
    oom_caught: int | None = None
    impossible: int = 0  # step_time: scored rows that are faster than their FLOPs at dense peak allow
    peer: str = ""  # the best figure anyone else has on it


@dataclass(frozen=True)
class Scoreboard:
    """All lines, and the forecasts they sum up."""

    lines: tuple[Line, ...]
    forecasts: tuple[Forecast, ...]

    @property
    def coverage(self) -> dict[str, float]:
        """Share of measured figures inside their 80 % interval, by target, over all tables."""
        found: dict[str, list[bool]] = {}
        for f in self.forecasts:
            if not math.isnan(f.low):
                found.setdefault(f.target, []).append(f.low <= f.measured <= f.high)
        return {target: sum(inside) / len(inside) for target, inside in found.items()}

    def errors(self) -> list[Errors]:
        """What intervals learn from."""
        return learn(
            (f.target, f.run.table, kind(f.run.job), generation(f.run.cluster), f.log_error)
            for f in self.forecasts
            if f.target in TARGETS[:3] and f.run.job is not None and f.run.cluster is not None
        )


def validate(
    runs: Sequence[Run],
    others: Sequence[Run] = (),
    *,
    known: Sequence[Errors] = (),
    time: Callable[..., StepTime] = step_time,
    memory: Callable[..., RankMemory] = rank_memory,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Scoreboard:
    """Score forecasts of ``runs``; scales and floors may also learn from ``others``, rows that are not scored.

    ``known`` are the errors intervals learn from; without it those that the package keeps.
    """
    mine = {r.id for r in runs}
    extra = [r for r in others if r.id not in mine]
    failures: dict[str, str] = {}
    forecasts: list[Forecast] = []
    everything = [*runs, *extra]
    for i, run in enumerate(everything):
        progress(i, len(everything))
        if run.job is None or run.cluster is None:
            failures[run.id] = run.skip
            continue
        try:
            forecasts += _forecast(run, time, memory)
        except (BursarError, ArithmeticError, ValueError) as error:
            failures[run.id] = str(error)
    scored = [f for f in forecasts if f.run.id in mine and f.run.role == "score"]
    scales = _Scales(forecasts)
    scored = [_with_interval(scales(f), known) for f in scored]
    rows: dict[str, list[Run]] = {}
    for run in runs:
        if run.role == "score":
            rows.setdefault(run.table, []).append(run)
    lines = []
    for table, runs_of_it in rows.items():
        for target in TARGETS:
            of_it = [f for f in scored if f.run.table == table and f.target == target]
            line = _line(table, target, of_it, runs_of_it, failures)
            if line is not None:
                lines.append(line)
    return Scoreboard(tuple(lines), tuple(scored))


def _forecast(run: Run, time: Callable[..., StepTime], memory: Callable[..., RankMemory]) -> list[Forecast]:
    """Every figure of a run that its source prints."""
    job, cluster = run.job, run.cluster
    assert job is not None  # the caller looked
    assert cluster is not None
    found = []
    if run.step_seconds:
        made = time(job, cluster)
        peak = cluster.peak(product_dtype(cluster.accelerator, job.precision))
        floor = _number(made.hardware_flops) / peak
        seconds = _number(made.seconds)
        found.append(Forecast(run, "step_time", run.step_seconds, seconds, floor))
        found.append(Forecast(run, "ranking", run.step_seconds, seconds))
    held = memory(job, cluster, rank="last" if "last_rank_only" in run.flags else "worst")
    if run.peak_bytes:
        asked = {"reserved": held.reserved_bytes, "nvidia_smi": held.device_bytes}.get(run.peak_kind, held.peak_bytes)
        found.append(Forecast(run, "peak_memory", run.peak_bytes, _number(asked)))
    if run.steady_bytes:
        found.append(Forecast(run, "steady_memory", run.steady_bytes, _number(held.steady_bytes)))
    if run.fits is not None:
        whole = memory(job, cluster) if "last_rank_only" in run.flags else held
        fits = _number(whole.device_bytes) <= cluster.accelerator.usable_bytes
        found.append(Forecast(run, "fits", float(run.fits), float(fits)))
    return found


def _number(value: Any) -> float:
    return float(np.asarray(value).reshape(-1)[0])


class _Scales:
    """One scale per target and GPU type for each table, learned from the others; a table's rows for calibration count
    among the others, as a voice of their own."""

    def __init__(self, forecasts: Iterable[Forecast]) -> None:
        ratios: dict[tuple[str, str, str, str], list[tuple[float, float]]] = {}
        for f in forecasts:
            if f.target != "fits" and f.run.cluster is not None:
                gpu, voice = f.run.cluster.accelerator.name, (f.run.table, f.run.role)
                ratios.setdefault((f.target, gpu, *voice), []).append((f.measured / f.predicted, f.measured / f.floor))
        self._typical = {
            key: (statistics.median(r for r, _ in found), statistics.median(floor for _, floor in found))
            for key, found in ratios.items()
        }
        self._known: dict[tuple[str, str, str], tuple[float, float]] = {}

    def __call__(self, f: Forecast) -> Forecast:
        """``f`` with its scales."""
        if f.run.cluster is None or f.target == "fits":
            return f
        key = (f.target, f.run.cluster.accelerator.name, f.run.table)
        if key not in self._known:
            self._known[key] = self._scale(*key)
        scale, floor = self._known[key]
        return replace(f, scale=scale, floor_scale=floor if f.target == "step_time" else math.nan)

    def _scale(self, target: str, gpu: str, table: str) -> tuple[float, float]:
        others = {
            key: found
            for key, found in self._typical.items()
            if key[0] == target and (key[2] != table or key[3] == "calibration")
        }
        same = [found for key, found in others.items() if key[1] == gpu]
        scale = statistics.median(r for r, _ in same) if same else 1.0
        floors = same or list(others.values())
        return scale, statistics.median(f for _, f in floors) if floors else math.nan


def _with_interval(f: Forecast, known: Sequence[Errors]) -> Forecast:
    if f.target not in TARGETS[:3] or f.run.job is None or f.run.cluster is None:
        return f
    by = factors(f.run.job, f.run.cluster, f.target, f.run.table, known)
    return replace(f, low=f.predicted * by.low, high=f.predicted * by.high)


# ---- lines


def _line(
    table: str, target: str, of_it: list[Forecast], runs: Sequence[Run], failures: Mapping[str, str]
) -> Line | None:
    has: Callable[[Run], Any] = {
        "step_time": lambda r: r.step_seconds,
        "peak_memory": lambda r: r.peak_bytes,
        "steady_memory": lambda r: r.steady_bytes,
        "fits": lambda r: r.fits is not None,
        "ranking": lambda r: r.step_seconds,
    }[target]
    asked = [r for r in runs if has(r)]
    if not asked:
        return None
    scored = {f.run.id for f in of_it}
    reasons = Counter(
        "the source prints none" if not has(r) else failures.get(r.id, "not forecast")
        for r in runs
        if r.id not in scored
    )
    skipped = sum(reasons.values())
    unexcused = sum(n for why, n in reasons.items() if why not in (*EXCUSED, "the source prints none"))
    base = Line(table, target, len(of_it), skipped, reasons=dict(reasons), peer=_peers().get(f"{table} {target}", ""))
    if not of_it:
        return replace(base, mape_with_skipped=1.0 if unexcused else None)
    if target == "ranking":
        return _ranked(base, of_it)
    if target == "fits":
        wrong = sum(f.measured != f.predicted for f in of_it)
        out = [f for f in of_it if not f.measured]
        n = len(of_it)
        return replace(
            base, mape=wrong / n, within_10=1 - wrong / n, mape_with_skipped=(wrong + unexcused) / (n + unexcused),
            oom_rows=len(out), oom_caught=sum(not f.predicted for f in out),
        )  # fmt: skip
    errors = np.array([f.predicted / f.measured - 1 for f in of_it])
    size = np.abs(errors)
    inside = [f.low <= f.measured <= f.high for f in of_it]
    floors = [abs(f.floor * f.floor_scale / f.measured - 1) for f in of_it if not math.isnan(f.floor_scale)]
    return replace(
        base,
        mape=float(size.mean()),
        median=float(np.median(size)),
        p90=float(np.quantile(size, 0.9)),
        bias=float(errors.mean()),
        within_10=float((size <= WITHIN).mean()),
        coverage_80=sum(inside) / len(inside),
        scaled_mape=statistics.fmean(abs(f.predicted * f.scale / f.measured - 1) for f in of_it),
        floor_mape=statistics.fmean(floors) if floors else None,
        impossible=sum(f.floor > f.measured for f in of_it),
        winkler=statistics.fmean(_winkler(f) for f in of_it),
        mape_with_skipped=float((size.sum() + unexcused) / (len(size) + unexcused)),
    )


def _winkler(f: Forecast) -> float:
    """Interval score over the measured figure: width, and 2/α per unit outside. Winkler 1972, JASA 67."""
    outside = max(0.0, f.low - f.measured, f.measured - f.high)
    return (f.high - f.low + 2 / (1 - COVERAGE) * outside) / f.measured


def _ranked(base: Line, of_it: Sequence[Forecast]) -> Line:
    """Kendall's tau-b and regret over groups of layouts of one model, batch and cluster."""
    groups: dict[tuple[Any, ...], list[Forecast]] = {}
    for f in of_it:
        job, cluster = f.run.job, f.run.cluster
        assert job is not None
        assert cluster is not None
        key = (replace(job.model, name=""), job.seq_len, int(job.samples), job.precision, cluster.name)
        groups.setdefault(key, []).append(f)
    taus, regrets, ranked = [], [], 0
    for group in groups.values():
        if len(group) < LEAST_TO_RANK:
            continue
        ranked += len(group)
        tau = _kendall([f.predicted for f in group], [f.measured for f in group])
        if tau is not None:
            taus.append(tau)
        chosen = min(group, key=lambda f: f.predicted)
        regrets.append(chosen.measured / min(f.measured for f in group) - 1)
    alone = len(of_it) - ranked
    reasons = {**base.reasons, **({"fewer than three layouts of its model and batch": alone} if alone else {})}
    return replace(
        base, rows=ranked, skipped=base.skipped + alone, reasons=reasons,
        kendall_tau=statistics.fmean(taus) if taus else None, regret=statistics.fmean(regrets) if regrets else None,
    )  # fmt: skip


def _kendall(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Kendall's tau-b; None where one of the two has ties only. Kendall 1945, Biometrika 33."""
    both = ties_a = ties_b = 0
    pairs = 0
    for (x, u), (y, v) in combinations(zip(a, b, strict=True), 2):
        pairs += 1
        ties_a += x == y
        ties_b += u == v
        both += int(np.sign(x - y) * np.sign(u - v))
    scale = math.sqrt((pairs - ties_a) * (pairs - ties_b))
    return both / scale if scale else None


@cache
def _peers() -> Mapping[str, str]:
    text = files("bursar").joinpath("catalog", "peers.toml").read_text(encoding="utf-8")
    return {key: row["figure"] for key, row in tomllib.loads(text).items()}
