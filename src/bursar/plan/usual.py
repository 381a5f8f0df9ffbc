"""The layouts one would try first: a few hundred, priced in the time of one. What a page asks while a slider moves.

They are some of `search`'s: powers of two, tensor parallelism inside the fast network, few stages, optimizer states or
everything sharded. Each has its memory and time from the same functions; only what is left out can be missed, and
benchmarks/ui.md keeps how much that is.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from bursar.errors import BadInput
from bursar.hardware import Cluster
from bursar.jobs import Job, Layout
from bursar.plan.intervals import factors
from bursar.plan.levers import LEVERS, Case, Outcome, Pulled, Settings, measure
from bursar.plan.search import AXES, NO_MEMORY, Choice, Plan, Question, enumerate_layouts, one
from bursar.rank_memory import RankMemory, rank_memory
from bursar.run import spent
from bursar.step_time import StepTime, step_time

RECOMPUTE: Final = (("none", 1), ("selective", 1), ("full", 1))
TOKENS_PER_PIECE: Final = 4096  # context parallelism below this many tokens of a rank is nobody's first try


@dataclass(frozen=True, slots=True)
class Usual:
    """The plan over the usual layouts, and the layout to show: the best, or where none fits the one nearest to it."""

    plan: Plan
    shown: Choice
    fits: bool


def narrowed(question: Question, cluster: Cluster) -> Question:
    """``question`` about the usual layouts alone; an axis that is given stays as given."""
    joined = min(cluster.scaleup_size if cluster.scaleup_size > 1 else cluster.node_size, 64)
    few = {
        "tp": _powers(joined),
        "pp": _powers(16),
        "cp": _powers(min(16, max(1, question.seq_len // TOKENS_PER_PIECE))),
        "ep": _powers(64),
        "zero_stage": (0, 1, 3),
        "fsdp": (1,),
        "virtual_stages": (1, 2, 4, 5, 8),
        "micro_batch": _powers(16 if cluster.count > 1 else 256),
    }
    return replace(
        question, fixed={**few, **question.fixed}, schedules=("1f1b", "interleaved"),
        recompute=RECOMPUTE if len(question.recompute) > 1 else question.recompute,
    )  # fmt: skip


def usual(question: Question, cluster: Cluster, top: int = 8) -> Usual:
    """The ``top`` usual layouts of ``question`` by time. Raises BadInput where what is given does not divide."""
    asked = narrowed(question, cluster)
    space = enumerate_layouts(asked, cluster.count)
    rows = len(space.columns["dp"])
    if not rows:
        why = ", ".join(space.rejected) or "the axes given do not divide the number of accelerators"
        raise BadInput(
            f"no layout of {cluster.name}: {why}; set fewer of its fields, or another number of accelerators"
        )
    usable = cluster.accelerator.usable_bytes
    rejected = Counter({why: n * asked.ways for why, n in space.rejected.items()})
    found: list[tuple[float, float, Job, int, StepTime, RankMemory]] = []
    nearest: tuple[float, float, Job, int, StepTime, RankMemory] | None = None
    for precision in asked.precisions:
        for recompute, every in asked.recompute:
            job = _job(asked, space.columns, precision, recompute, every)
            held = rank_memory(job, cluster)
            device = np.broadcast_to(held.device_bytes, rows)
            fit = np.flatnonzero(device <= usable)
            rejected[NO_MEMORY] += rows - len(fit)
            if not len(fit):
                least = int(np.argmin(device))
                if nearest is None or device[least] < nearest[1]:
                    nearest = (math.inf, float(device[least]), job, least, step_time(job, cluster), held)
                continue
            took = step_time(job, cluster)
            per_token = np.broadcast_to(took.seconds, rows) / np.asarray(job.tokens)
            order = fit[np.lexsort((device[fit], per_token[fit]))]
            for i in _unlike(job, order, top):
                found.append((float(per_token[i]), float(device[i]), job, int(i), took, held))
    found.sort(key=lambda entry: entry[:2])
    best = tuple(_choice(asked, cluster, *entry[2:]) for entry in found[:top])
    searched = space.searched * asked.ways
    feasible = searched - sum(rejected.values())
    reasons = {why: n for why, n in rejected.most_common() if n}
    if best:
        return Usual(Plan(asked, "time", best, searched, reasons, feasible), best[0], True)
    assert nearest is not None  # there are rows, and none of them fits
    shown = _choice(asked, cluster, *nearest[2:])
    return Usual(Plan(asked, "time", (), searched, reasons, 0), shown, False)


def _unlike(job: Job, order: Any, top: int) -> list[int]:
    """The first ``top`` rows of ``order`` that divide the ranks in different ways: of one way the best is enough."""
    lay = job.layout
    ways = np.stack([np.asarray(getattr(lay, a))[order] for a in ("tp", "pp", "cp", "ep", "zero_stage", "fsdp")])
    _, first = np.unique(ways, axis=1, return_index=True)
    return [int(order[i]) for i in sorted(first)[:top]]


def pulled(choice: Choice) -> tuple[Outcome, tuple[Pulled, ...]]:
    """What ``choice`` takes, and what each lever alone would make of it, all else as it is."""
    base, on, settings = Case(choice.job), choice.cluster, Settings()
    found = []
    for row in LEVERS:
        after = row.apply(base, on, settings)
        found.append(Pulled(row, None, after) if isinstance(after, str) else Pulled(row, measure(after, on)))
    return measure(base, on), tuple(found)


def _job(question: Question, columns: dict[str, Any], precision: str, recompute: str, every: int) -> Job:
    layout = Layout(**{a: columns[a] for a in AXES[:10]}, schedule="interleaved")
    return Job(
        question.model, question.seq_len, layout, columns["micro_batch"], columns["micro_batches"],
        precision=precision, recompute=recompute, recompute_every=every, attention=question.attention,
        optimizer=question.optimizer, framework=question.framework, compiled=question.compiled,
    )  # fmt: skip


def _choice(question: Question, cluster: Cluster, job: Job, row: int, took: StepTime, held: RankMemory) -> Choice:
    """The layout in one row of a job's arrays."""

    def of(value: Any) -> float:
        made = np.asarray(value)
        return float(made[row] if made.ndim else made)

    picked, seconds, peak = one(job, row), of(took.seconds), of(held.peak_bytes)
    if picked.layout.virtual_stages == 1:  # the same, by its usual name
        picked = replace(picked, layout=replace(picked.layout, schedule="1f1b"))
    steps = run = usd = kwh = None
    if question.tokens is not None:
        steps = math.ceil(question.tokens / int(picked.tokens))
        run = steps * seconds
        usd, kwh = spent(cluster, run, question.usd_per_gpu_hour)
    time, memory = factors(picked, cluster, "step_time"), factors(picked, cluster, "peak_memory")
    return Choice(
        cluster, picked, seconds, of(took.mfu), peak, of(held.device_bytes),
        {k: of(v) for k, v in took.parts.items()}, {k: of(v) for k, v in held.parts.items()},
        steps, run, usd, kwh, (seconds * time.low, seconds * time.high), (peak * memory.low, peak * memory.high),
    )  # fmt: skip


def _powers(limit: int) -> tuple[int, ...]:
    return tuple(1 << k for k in range(max(1, limit).bit_length()))
