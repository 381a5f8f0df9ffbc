"""The layouts one would try first: a few hundred, priced in the time of one. What a page asks while a slider moves.

They are some of `search`'s: powers of two, tensor parallelism inside the fast network, few stages, optimizer states or
everything sharded. Each has its memory and time from the same functions; only what is left out can be missed, and
benchmarks/ui.md keeps how much that is.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

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

RECOMPUTE: Final = (("none", 1), ("full", 1))  # and, where attention stores scores, selective
OF_THE_WHOLE: Final = ("cpu-offload", "sparse-gradients")  # levers that take a rank's parameters to be all of them
TOKENS_PER_PIECE: Final = 4096  # context parallelism below this many tokens of a rank is nobody's first try


@dataclass(frozen=True, slots=True)
class Usual:
    """The plan over the usual layouts, and the layout to show: the best, or where none fits the one nearest to it."""

    plan: Plan
    shown: Choice
    fits: bool


class Entry(NamedTuple):
    """A layout among those of a job's arrays: its time per token and its memory, and where they stand."""

    per_token: float
    device_bytes: float
    job: Job
    row: int  # of ``job`` and ``took``
    took: StepTime
    held: RankMemory
    held_row: int


def narrowed(question: Question, cluster: Cluster) -> Question:
    """``question`` about the usual layouts alone; an axis that is given stays as given."""
    joined = min(cluster.scaleup_size if cluster.scaleup_size > 1 else cluster.node_size, 64)
    few = {
        "tp": _powers(joined),
        "pp": _powers(16),
        "cp": _powers(min(16, max(1, question.seq_len // TOKENS_PER_PIECE))),
        "ep": (1, 8, 16, 32, 64),
        "zero_stage": (0, 1, 3) if cluster.count < 256 else (1, 3),  # 0 is for a single replica
        "fsdp": (1,),
        "virtual_stages": (1, 2, 3, 4, 5, 6),
        "micro_batch": _powers(max(8, 512 // cluster.count)),
    }
    ways = (*RECOMPUTE, ("selective", 1)) if question.attention == "naive" else RECOMPUTE
    return replace(
        question, fixed={**few, **question.fixed}, schedules=("1f1b", "interleaved"),
        recompute=ways if len(question.recompute) > 1 else question.recompute,
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
    found: list[Entry] = []
    misses: list[Entry] = []
    for precision in asked.precisions:
        for recompute, every in asked.recompute:
            job = _job(asked, space.columns, precision, recompute, every)
            held = rank_memory(job, cluster)
            device = np.broadcast_to(held.device_bytes, rows)
            fit = np.flatnonzero(device <= usable)
            rejected[NO_MEMORY] += rows - len(fit)
            if not len(fit):
                fit = np.array([int(np.argmin(device))])
            job = _job(asked, {a: column[fit] for a, column in space.columns.items()}, precision, recompute, every)
            took, device = step_time(job, cluster), device[fit]
            per_token = np.broadcast_to(took.seconds, len(fit)) / np.asarray(job.tokens)
            entries = [
                Entry(float(per_token[i]), float(device[i]), job, i, took, held, int(fit[i]))
                for i in _unlike(job, np.lexsort((device, per_token)), top)
            ]
            (found if device[0] <= usable else misses).extend(entries)
    found.sort(key=lambda e: (e.per_token, e.device_bytes))
    best = tuple(_choice(asked, cluster, entry) for entry in found[:top])
    nearest = found[0] if found else min(misses, key=lambda e: e.device_bytes)
    searched = space.searched * asked.ways
    plan = Plan(
        asked, "time", best, searched, {why: n for why, n in rejected.most_common() if n},
        searched - sum(rejected.values()), assumptions=nearest.took.assumptions,
    )  # fmt: skip
    return Usual(plan, best[0] if best else _choice(asked, cluster, nearest), bool(best))


def _unlike(job: Job, order: Any, top: int) -> list[int]:
    """The first ``top`` rows of ``order`` that divide the ranks in different ways: of one way the best is enough."""
    lay = job.layout
    ways = np.stack([np.asarray(getattr(lay, a)) for a in ("tp", "pp", "cp", "ep", "zero_stage", "fsdp")], axis=1)
    found: dict[tuple[int, ...], int] = {}
    for row in order.tolist():
        found.setdefault(tuple(ways[row].tolist()), row)
        if len(found) == top:
            break
    return list(found.values())


def pulled(choice: Choice) -> tuple[Outcome, tuple[Pulled, ...]]:
    """What ``choice`` takes, and what each lever alone would make of it, all else as it is."""
    base, on, settings = Case(choice.job), choice.cluster, Settings()
    found = []
    split = choice.job.layout.tp * choice.job.layout.pp > 1
    for row in LEVERS:
        after = row.apply(base, on, settings)
        if split and row.name in OF_THE_WHOLE and not isinstance(after, str):
            after = "worked out for data parallelism alone, and this layout splits the model"
        found.append(Pulled(row, None, after) if isinstance(after, str) else Pulled(row, measure(after, on)))
    return measure(base, on), tuple(found)


def _job(question: Question, columns: dict[str, Any], precision: str, recompute: str, every: int) -> Job:
    layout = Layout(**{a: columns[a] for a in AXES[:10]}, schedule="interleaved")
    return Job(
        question.model, question.seq_len, layout, columns["micro_batch"], columns["micro_batches"],
        precision=precision, recompute=recompute, recompute_every=every, attention=question.attention,
        optimizer=question.optimizer, framework=question.framework, compiled=question.compiled,
    )  # fmt: skip


def _choice(question: Question, cluster: Cluster, entry: Entry) -> Choice:
    """The layout of an entry, out of its job's arrays."""

    def of(value: Any, row: int) -> float:
        made = np.asarray(value)
        return float(made[row] if made.ndim else made)

    took, held, at = entry.took, entry.held, entry.held_row
    picked, seconds, peak = one(entry.job, entry.row), of(took.seconds, entry.row), of(held.peak_bytes, at)
    if picked.layout.virtual_stages == 1:  # the same, by its usual name
        picked = replace(picked, layout=replace(picked.layout, schedule="1f1b"))
    steps = run = usd = kwh = None
    if question.tokens is not None:
        steps = math.ceil(question.tokens / int(picked.tokens))
        run = steps * seconds
        usd, kwh = spent(cluster, run, question.usd_per_gpu_hour)
    time, memory = factors(picked, cluster, "step_time"), factors(picked, cluster, "peak_memory")
    return Choice(
        cluster, picked, seconds, of(took.mfu, entry.row), peak, of(held.device_bytes, at),
        {k: of(v, entry.row) for k, v in took.parts.items()}, {k: of(v, at) for k, v in held.parts.items()},
        steps, run, usd, kwh, (seconds * time.low, seconds * time.high), (peak * memory.low, peak * memory.high),
    )  # fmt: skip


def _powers(limit: int) -> tuple[int, ...]:
    return tuple(1 << k for k in range(max(1, limit).bit_length()))
