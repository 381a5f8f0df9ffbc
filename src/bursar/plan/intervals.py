"""The 80 % interval of a forecast: how far those of published runs were off. No fit of the forecast itself.

`catalog/errors.toml` keeps, for each table of published runs and each kind of run in it, quantiles of
log(measured / forecast). A forecast's interval is that of a run in a table nobody has seen yet: the spread within
tables and the spread between them, every table one voice whatever its length, those of the forecast's kind louder.
Where a table is scored, its own errors are left out.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from bursar.hardware import Cluster
from bursar.jobs import Job

COVERAGE = 0.8
LEVELS = tuple(i / 20 for i in range(21))  # the quantiles kept of each group's errors
SAME_KIND, SAME_GENERATION = 2.0, 2.0  # how much more a group weighs that is of the forecast's kind, of its GPUs' age
UNSEEN = 1.5  # how much wider where no table has runs of its kind on GPUs of its age
LEAST_HALF_WIDTH = 0.02  # no table of measurements repeats itself better
NORMAL_90 = 1.2816  # standard deviations to the 90 % quantile
_AT_10, _AT_50, _AT_90 = 2, 10, 18  # places in LEVELS
UNKNOWN = (0.5, 1.5)  # where no published run is of any use


@dataclass(frozen=True, slots=True)
class Errors:
    """Quantiles of log(measured / forecast) of one kind of run in one table."""

    target: str
    table: str
    kind: str
    generation: str
    rows: int
    log_errors: tuple[float, ...]  # at LEVELS


@dataclass(frozen=True, slots=True)
class Factors:
    """A forecast's interval, as factors of it, and the tables it was learned from."""

    low: float
    high: float
    tables: tuple[str, ...]
    rows: int


def kind(job: Job) -> str:
    """What sort of run a job is, as far as its errors are concerned."""
    stage = int(np.max(np.asarray(job.layout.zero_stage)))
    if job.model.n_experts:
        return "mixture"
    if job.model.d_model <= 2048:
        return "small"  # launches count, or a continuous-integration test
    return "sharded" if stage == 3 else "model parallel"


def generation(cluster: Cluster) -> str:
    """The age of its accelerators: with 8-bit products, or before."""
    return "fp8" if "fp8" in cluster.accelerator.peak_flops_per_s else "before fp8"


@cache
def published() -> tuple[Errors, ...]:
    """What `catalog/errors.toml` keeps."""
    found = files("bursar").joinpath("catalog", "errors.toml")
    if not found.is_file():
        return ()
    rows = tomllib.loads(found.read_text(encoding="utf-8")).get("errors", [])
    return tuple(Errors(**{**row, "log_errors": tuple(row["log_errors"])}) for row in rows)


def factors(job: Job, cluster: Cluster, target: str, without: str = "", known: Sequence[Errors] = ()) -> Factors:
    """The 80 % interval of a forecast of ``target`` (step_time, peak_memory, steady_memory) for ``job``.

    ``without`` names a table whose errors are left out; ``known`` takes the place of the published errors. One call
    serves a job whose numbers are arrays: its kind follows from the model and the GPUs.
    """
    mine, age = kind(job), generation(cluster)
    groups = [e for e in (known or published()) if e.target == target and e.table != without]
    if not groups and target == "steady_memory":  # what is kept between steps is part of what is held at the peak
        return factors(job, cluster, "peak_memory", without, known)
    if not groups:
        return Factors(*UNKNOWN, (), 0)
    rows_of: dict[str, int] = {}
    for e in groups:
        rows_of[e.table] = rows_of.get(e.table, 0) + e.rows
    weight = np.array([
        (SAME_KIND if e.kind == mine else 1.0) * (SAME_GENERATION if e.generation == age else 1.0) * e.rows
        / rows_of[e.table]
        for e in groups
    ])  # fmt: skip
    weight = weight / weight.sum()
    middle = np.array([e.log_errors[_AT_50] for e in groups])
    spread = np.array([(e.log_errors[_AT_90] - e.log_errors[_AT_10]) / (2 * NORMAL_90) for e in groups])
    voices = 1 / float(np.sum(weight**2))
    mean = float(weight @ middle)
    between = float(weight @ (middle - mean) ** 2) * voices / max(voices - 1, 0.5)
    deviation = math.sqrt(float(weight @ spread**2) + between * (1 + 1 / voices))
    seen = any(e.kind == mine and e.generation == age for e in groups)
    half = max(NORMAL_90 * deviation * (1.0 if seen else UNSEEN), LEAST_HALF_WIDTH)
    return Factors(
        math.exp(min(mean - half, -LEAST_HALF_WIDTH)), math.exp(max(mean + half, LEAST_HALF_WIDTH)),
        tuple(sorted(rows_of)), sum(rows_of.values()),
    )  # fmt: skip


def learn(found: Iterable[tuple[str, str, str, str, float]]) -> list[Errors]:
    """Groups of (target, table, kind, generation, log(measured / forecast))."""
    groups: dict[tuple[str, str, str, str], list[float]] = {}
    for *key, error in found:
        groups.setdefault(tuple(key), []).append(error)  # type: ignore[arg-type]  # four strings
    return [
        Errors(*key, len(errors), tuple(round(float(q), 4) for q in np.quantile(errors, LEVELS)))
        for key, errors in sorted(groups.items())
    ]


def as_toml(errors: Iterable[Errors]) -> str:
    """The file `published` reads."""
    lines = [
        "# Quantiles (0, 5, … 100 %) of log(measured / forecast) on published runs, by table and kind of run.",
        "# Written by `bursar validate FOLDER --learn FILE`. Intervals learn from these; forecasts never do.",
    ]
    for e in errors:
        text: dict[str, Any] = {"target": e.target, "table": e.table, "kind": e.kind, "generation": e.generation}
        lines += ["", "[[errors]]", *(f'{k} = "{v}"' for k, v in text.items())]
        lines += [f"rows = {e.rows}", f"log_errors = [{', '.join(f'{x:.4g}' for x in e.log_errors)}]"]
    return "\n".join(lines) + "\n"
