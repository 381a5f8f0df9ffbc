"""Search over layouts: every way a step can be laid out on a cluster, priced by what `validate` is scored with.

    enumerate    dp tp pp cp ep · ZeRO and its groups · virtual stages · micro-batch: what divides, and why the rest not
    fit          `rank_memory` of every one, with each way to recompute
    time         `step_time` of those that fit
    rank         by time of the run, by cost, or by memory left

Nothing is pruned by guesswork: a combination is rejected for one named reason, or it gets its memory and its time. All
of it is arithmetic on arrays, a group of layouts at a time.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from bursar.errors import BadInput, NoAnswer, UnknownName
from bursar.hardware import Cluster
from bursar.jobs import PRECISIONS, SCHEDULES, Decoder, Job, Layout
from bursar.plan.intervals import factors
from bursar.rank_memory import rank_memory
from bursar.run import price_of, spent
from bursar.step_time import step_time
from bursar.units import SECONDS_PER_DAY, format_bytes, format_count, format_usd

Array = Any
Entry = tuple[float, float, Job, int]  # what it is ranked by, bytes, and where it stands: a job and its row

AXES: Final = ("dp", "tp", "pp", "cp", "ep", "fsdp", "zero_stage", "reshard_after_forward", "sequence_parallel",
               "virtual_stages", "micro_batch", "micro_batches")  # fmt: skip
GIVEN: Final = ("dp", "tp", "pp", "cp", "ep", "fsdp", "zero_stage", "sequence_parallel", "virtual_stages",
                "micro_batch")  # fmt: skip
RECOMPUTE: Final = (("none", 1), ("selective", 1), ("full", 1), ("full", 2), ("full", 4), ("full", 8))
BY: Final = ("time", "cost", "memory")
CHUNK: Final = 1 << 17  # layouts priced at once: some hundred arrays of a megabyte

NO_TP = "tp does not divide the heads or the feed-forward"
NO_CP = "cp does not cut the sequence into pairs of equal pieces"
NO_PP = "more stages than layers"
NO_EP = "ep does not divide the experts, or the ranks they live on"
NO_SP = "sequence parallelism without tp changes nothing"
NO_SHARDS = "one replica: there is nothing to shard"
NO_CHUNKS = "virtual stages do not divide a stage's layers"
NO_BATCH = "the batch is no multiple of dp × micro-batch, not even nearly"
NO_BLOCKS = "every k blocks needs k blocks on a stage"
NO_MEMORY = "does not fit in memory"
NO_MONEY = "over the budget"
NO_TIME = "takes longer than the days given"
_THREADS: Final = 4
_MOST_CHUNKS: Final = 16  # virtual stages of one rank
_MOST_TRIED: Final = 2048  # accelerators, in looking for a number on which something fits
_SLACK: Final = 1 / 8  # a batch is rounded to the nearest that divides, up to this share of it


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be laid out. ``batch`` is in sequences, and may be a fraction: it is rounded per layout."""

    model: Decoder
    seq_len: int
    batch: float
    tokens: float | None = None
    precisions: tuple[str, ...] = ("bf16",)
    schedules: tuple[str, ...] = ("1f1b", "interleaved")
    recompute: tuple[tuple[str, int], ...] = RECOMPUTE
    attention: str = "flash"
    optimizer: str = "adamw"
    framework: str = "megatron-bridge"
    compiled: bool = False
    # axes that are not searched, or of which only some values are
    fixed: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict, hash=False)
    days: float | None = None  # at most
    budget_usd: float | None = None  # at most
    usd_per_gpu_hour: float | None = None  # in place of the catalogue's
    notes: tuple[str, ...] = ()  # what was taken for granted in asking

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch"):
            if not 1 <= getattr(self, name) < 1e12:
                raise BadInput(f"{name} is {getattr(self, name):.4g}; give 1 or more")
        for name in ("tokens", "days", "budget_usd", "usd_per_gpu_hour"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e30:
                raise BadInput(f"{name} is {value!r}; give a finite number above zero")
        for name in ("precisions", "schedules", "recompute"):
            if not getattr(self, name):
                raise BadInput(f"no {name} are given: there is nothing to search")
        _known("precision", self.precisions, PRECISIONS)
        _known("schedule", self.schedules, SCHEDULES)
        _known("axis of a layout", tuple(self.fixed), GIVEN)

    @property
    def ways(self) -> int:
        """Combinations of what is no layout: recompute and precision."""
        return len(self.recompute) * len(self.precisions)


@dataclass(frozen=True, slots=True)
class Choice:
    """One layout with its price. Bytes are of the worst rank."""

    cluster: Cluster
    job: Job
    step_seconds: float
    mfu: float
    peak_bytes: float  # allocated
    device_bytes: float  # what has to fit
    time: Mapping[str, float] = field(hash=False)  # the parts of ``step_seconds``
    memory: Mapping[str, float] = field(hash=False)  # the parts of ``peak_bytes``
    steps: int | None = None
    seconds: float | None = None  # of the run
    usd: float | None = None
    kwh: float | None = None
    step_interval: tuple[float, float] = (0.0, math.inf)  # 80 %, seconds
    peak_interval: tuple[float, float] = (0.0, math.inf)  # 80 %, bytes

    @property
    def batch_tokens(self) -> int:
        """Tokens of one step, after rounding."""
        return int(self.job.tokens)

    @property
    def days(self) -> float | None:
        """Of the run."""
        return None if self.seconds is None else self.seconds / SECONDS_PER_DAY

    @property
    def headroom_bytes(self) -> float:
        """What is left of the memory that the driver shows."""
        return self.cluster.accelerator.usable_bytes - self.device_bytes

    @property
    def tokens_per_gpu_second(self) -> float:
        """Tokens per second and accelerator."""
        return self.batch_tokens / self.step_seconds / self.cluster.count

    @property
    def recompute(self) -> str:
        """As published tables have it: none, selective, full, every_k:4."""
        return self.job.recompute if self.job.recompute_every == 1 else f"every_k:{self.job.recompute_every}"

    def record(self) -> dict[str, Any]:
        """One entry of ``plan --json``."""
        lay, job = self.job.layout, self.job
        layout = {a: int(getattr(lay, a)) for a in AXES[:10]} | {"schedule": lay.schedule if lay.pp > 1 else "none"}
        return {
            "layout": layout,
            "micro_batch": int(job.micro_batch),
            "recompute": self.recompute,
            "step_seconds": self.step_seconds,
            "mfu": self.mfu,
            "peak_bytes": round(self.peak_bytes),
            "days": self.days,
            "usd": self.usd,
            "accelerator": self.cluster.accelerator.name,
            "gpus": self.cluster.count,
            "precision": job.precision,
            "micro_batches": int(job.micro_batches),
            "batch_tokens": self.batch_tokens,
            "steps": self.steps,
            "device_bytes": round(self.device_bytes),
            "headroom_bytes": round(self.headroom_bytes),
            "tokens_per_gpu_second": self.tokens_per_gpu_second,
            "gpu_hours": None if self.seconds is None else self.cluster.count * self.seconds / 3600,
            "kwh": self.kwh,
            "step_seconds_80": list(self.step_interval),
            "peak_bytes_80": [round(x) for x in self.peak_interval],
            "time": dict(self.time),
            "memory": dict(self.memory),
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer: the best layouts, best first, and what became of the rest."""

    question: Question
    by: str
    layouts: tuple[Choice, ...]
    searched: int  # every combination considered
    rejected: Mapping[str, int] = field(hash=False)
    feasible: int = 0  # those that got memory and time, and keep to days and budget
    nearest: str = ""  # where nothing is feasible: what would be
    assumptions: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """Whether anything will do, in one line."""
        if not self.layouts:
            return f"no: none of {self.searched:,} combinations will do"
        best = self.layouts[0]
        return (
            f"yes: {self.feasible:,} of {self.searched:,} combinations will do; the first is {_words(best.job)} on "
            f"{best.cluster.name}, {format_bytes(best.device_bytes)} per device"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from bursar.report.plan import notebook

        return notebook(self)

    def record(self) -> dict[str, Any]:
        """The fields of ``plan --json``."""
        return {
            "layouts": [choice.record() for choice in self.layouts],
            "searched": self.searched,
            "rejected": dict(self.rejected),
            "feasible": self.feasible,
            "by": self.by,
            "model": self.question.model.name,
            "nearest": self.nearest or None,
            "assumptions": list(self.assumptions),
        }


def search(
    question: Question, clusters: Sequence[Cluster], by: str = "time", top: int = 10, distinct: bool = False
) -> Plan:
    """The ``top`` layouts of ``question`` on any of ``clusters``, by time, cost or memory.

    ``distinct`` shows of each division of the ranks (dp, tp, pp, cp, ep) the best alone: what it shards, its chunks and
    micro-batch. All are searched either way.

    With ``days`` and a range of clusters, the fewest accelerators come first. Raises BadInput for what cannot be meant;
    where nothing fits, the plan has no layouts and says what comes nearest.
    """
    _known("order", (by,), BY)
    if not clusters:
        raise BadInput("no cluster to search: name one, such as 8xh100-sxm")
    if by == "cost" or question.budget_usd is not None:
        for cluster in clusters:
            if price_of(cluster.accelerator, question.usd_per_gpu_hour) is None:
                raise BadInput(
                    f"the catalogue has no price for {cluster.accelerator.name}: give --usd-per-gpu-hour, "
                    "or rank by time or memory"
                )
    if by == "cost" and question.tokens is None:
        raise BadInput("a cost needs the tokens of the run: give --tokens, or rank by time or memory")
    searched, rejected, found = 0, Counter[str](), []
    smallest: tuple[float, str] | None = None
    for cluster in clusters:
        n, reasons, kept, least = _on(question, cluster, by, top, distinct)
        searched += n
        rejected.update(reasons)
        found.extend(kept)
        if least is not None and (smallest is None or least < smallest):
            smallest = least
    feasible = searched - sum(rejected.values())
    key = _order(by, fewest=question.days is not None and len({c.count for c in clusters}) > 1)
    best = tuple(sorted(found, key=key)[:top])
    nearest = "" if best else _nearest(question, clusters, rejected, smallest)
    return Plan(question, by, best, searched, dict(rejected.most_common()), feasible, nearest, _notes(question, best))


def _order(by: str, fewest: bool) -> Any:
    def key(choice: Choice) -> tuple[float, ...]:
        per_token = choice.step_seconds / choice.batch_tokens
        first = {
            "time": per_token,
            "cost": choice.usd if choice.usd is not None else per_token * choice.cluster.count,
            "memory": -choice.headroom_bytes,
        }[by]
        return (choice.cluster.count, first, choice.device_bytes) if fewest else (first, choice.device_bytes)

    return key


# ---- what can be laid out


@dataclass(slots=True)
class Space:
    """Layouts of one number of ranks, a column per axis, and why the others are none."""

    columns: dict[str, Array]
    searched: int
    rejected: Counter[str]


def enumerate_layouts(question: Question, n_ranks: int) -> Space:
    """Every layout of ``n_ranks`` ranks that divides; ``searched`` counts the others too."""
    model, S, fixed = question.model, question.seq_len, question.fixed
    micro = _axis(fixed, "micro_batch", _powers(max(1, int(question.batch * (1 + _SLACK)))))
    chunks = [1]
    if "interleaved" in question.schedules:
        chunks = [v for v in _divisors(model.n_layers) if v <= _MOST_CHUNKS]
    elif "dualpipev" in question.schedules:
        chunks = [1, 2]
    experts = _divisors(model.n_experts) if model.n_experts else [1]
    columns: dict[str, list[Array]] = {a: [] for a in AXES}
    searched, rejected = 0, Counter[str]()
    for tp in _axis(fixed, "tp", _divisors(n_ranks)):
        for pp in _axis(fixed, "pp", _divisors(n_ranks // tp) if n_ranks % tp == 0 else []):
            for cp in _axis(fixed, "cp", _divisors(n_ranks // (tp * pp)) if n_ranks % (tp * pp) == 0 else []):
                if n_ranks % (tp * pp * cp):
                    continue
                dp = n_ranks // (tp * pp * cp)
                if dp not in _axis(fixed, "dp", [dp]):
                    continue
                shards = _shardings(dp * cp, fixed)
                inner = len(_axis(fixed, "sequence_parallel", [0, 1])) * len(shards) * len(micro)
                inner *= len(_axis(fixed, "virtual_stages", chunks))
                for ep in _axis(fixed, "ep", experts):
                    searched += inner
                    why = _structure(model, S, dp, tp, pp, cp, ep)
                    if why:
                        rejected[why] += inner
                        continue
                    _inner(question, (dp, tp, pp, cp, ep), shards, micro, chunks, columns, rejected)
    made = {a: np.concatenate(c) if c else np.zeros(0) for a, c in columns.items()}
    return Space(made, searched, rejected)


def _structure(model: Decoder, S: int, dp: int, tp: int, pp: int, cp: int, ep: int) -> str:
    """Why this division is none, or nothing."""
    if model.n_heads % tp or (model.n_kv_heads % tp and tp % model.n_kv_heads) or model.d_ff % tp:
        return NO_TP
    if cp > 1 and S % (2 * cp):  # causal: each rank takes a piece from the front and one from the back
        return NO_CP
    if pp > model.n_layers:
        return NO_PP
    if ep > 1 and (model.n_experts % ep or (dp * cp * tp) % ep):
        return NO_EP
    return ""


def _shardings(replicas: int, fixed: Mapping[str, int | tuple[int, ...]]) -> list[tuple[int, int, int]]:
    """(stage, reshard after forward, group or 1 for all) over dp·cp ranks: ZeRO 0 to 3, FSDP, HSDP."""
    stages = _axis(fixed, "zero_stage", [0, 1, 2, 3])
    groups = _axis(fixed, "fsdp", [1, *(g for g in _divisors(replicas) if 1 < g < replicas)])
    plain = [(stage, 1, 1) for stage in stages if stage < 3 and 1 in groups]
    return plain + [(3, again, g) for g in groups if 3 in stages for again in (1, 0)]


def _inner(
    question: Question,
    outer: tuple[int, int, int, int, int],
    shards: list[tuple[int, int, int]],
    micro: list[int],
    chunks: list[int],
    columns: dict[str, list[Array]],
    rejected: Counter[str],
) -> None:
    """The axes inside one division of the ranks: what holds is added to ``columns``, the rest counted by its reason."""
    dp, tp, pp, cp, _ = outer
    model, fixed = question.model, question.fixed
    sp, shard, v, b = (
        a.ravel() for a in np.meshgrid(
            np.array(_axis(fixed, "sequence_parallel", [0, 1])), np.arange(len(shards)),
            np.array(_axis(fixed, "virtual_stages", chunks)), np.array(micro), indexing="ij",
        )
    )  # fmt: skip
    stage, again, group = (np.array(column)[shard] for column in zip(*shards, strict=True))
    # interleaved schedules take micro-batches in rounds of pp
    rounds = np.where(v > 1, pp, 1)
    many = np.maximum(np.rint(question.batch / (dp * b * rounds)), 1).astype(np.int64) * rounds
    off = np.abs(many * dp * b / question.batch - 1)
    seq = question.seq_len // cp if question.seq_len % cp == 0 else 0
    reasons = (
        (NO_SP, (sp == 1) & ((tp == 1) | (seq % tp != 0))),
        (NO_SHARDS, (stage > 0) & (dp * cp == 1)),
        (NO_CHUNKS, (v > 1) & ((pp == 1) | (model.n_layers % (pp * v) != 0))),
        (NO_BATCH, off > _SLACK),
    )
    good = np.ones(len(b), dtype=bool)
    for why, bad in reasons:
        n = int(np.count_nonzero(bad & good))
        if n:
            rejected[why] += n
            good &= ~bad
    if not good.any():
        return
    size = int(np.count_nonzero(good))
    for name, value in zip(("dp", "tp", "pp", "cp", "ep"), outer, strict=True):
        columns[name].append(np.full(size, value, dtype=np.int64))
    for name, column in (
        ("fsdp", group), ("zero_stage", stage), ("reshard_after_forward", again), ("sequence_parallel", sp),
        ("virtual_stages", v), ("micro_batch", b), ("micro_batches", many),
    ):  # fmt: skip
        columns[name].append(column[good].astype(np.int64))


# ---- what it costs


def _jobs(question: Question, columns: Mapping[str, Array]) -> Iterator[tuple[Job, Array]]:
    """Groups of layouts that one call prices, with the rows of ``columns`` that each stands for."""
    v, pp = columns["virtual_stages"], columns["pp"]
    flat, chunked = np.flatnonzero(v == 1), np.flatnonzero(v > 1)
    plain = [s for s in question.schedules if s not in ("interleaved", "dualpipev")] or ["1f1b"]
    groups = [(s, flat if s == plain[0] else flat[pp[flat] > 1]) for s in plain]
    groups += [(s, chunked) for s in question.schedules if s == "interleaved"]
    groups += [(s, np.flatnonzero((v == 2) & (pp > 1))) for s in question.schedules if s == "dualpipev"]
    for precision in question.precisions:
        for recompute, every in question.recompute:
            for schedule, rows in groups:
                for start in range(0, len(rows), CHUNK):
                    part = rows[start : start + CHUNK]
                    yield _job(question, columns, part, schedule, precision, recompute, every), part


def _job(
    question: Question,
    columns: Mapping[str, Array],
    rows: Any,
    schedule: str,
    precision: str,
    recompute: str,
    every: int,
) -> Job:
    of = {a: columns[a][rows] for a in AXES}
    layout = Layout(**{a: of[a] for a in AXES[:10]}, schedule=schedule)
    return Job(
        question.model, question.seq_len, layout, of["micro_batch"], of["micro_batches"],
        precision=precision, recompute=recompute, recompute_every=every, attention=question.attention,
        optimizer=question.optimizer, framework=question.framework, compiled=question.compiled,
    )  # fmt: skip


def one(job: Job, row: int) -> Job:
    """The layout in ``row`` of a job that stands for many."""
    lay = job.layout
    at: dict[str, Any] = {a: int(np.asarray(getattr(lay, a))[row]) for a in AXES[:10]}
    layout = replace(lay, **at)
    return replace(
        job, layout=layout,
        micro_batch=int(np.asarray(job.micro_batch)[row]), micro_batches=int(np.asarray(job.micro_batches)[row]),
    )  # fmt: skip


def _on(
    question: Question, cluster: Cluster, by: str, top: int, distinct: bool = False
) -> tuple[int, Counter[str], list[Choice], tuple[float, str] | None]:
    """One cluster: combinations considered, why they were rejected, the best of the rest, the least memory needed."""
    space = enumerate_layouts(question, cluster.count)
    ways, rejected = question.ways, Counter({why: n * question.ways for why, n in space.rejected.items()})
    searched = space.searched * ways
    best: list[Entry] = []
    least: tuple[float, str] | None = None
    seen = 0

    def priced_group(group: tuple[Job, Array]) -> tuple[int, Counter[str], tuple[float, str] | None, list[Entry]]:
        return len(group[1]), *_group(question, cluster, by, top, distinct, group[0])

    # NumPy lets go of the interpreter in its loops; the order of the answers is the groups', whoever is first
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for n, reasons, found, entries in pool.map(priced_group, _jobs(question, space.columns)):
            seen += n
            rejected.update(reasons)
            if found is not None and (least is None or found < least):
                least = found
            best += entries
    searched += (seen - len(space.columns["dp"]) * ways) if seen else 0  # further schedules of the same layouts
    best.sort(key=lambda entry: (entry[0], entry[1]))
    if distinct:
        seen_divisions: dict[int, Entry] = {}
        for entry in best:
            seen_divisions.setdefault(int(_division(entry[2])[entry[3]]), entry)
        best = list(seen_divisions.values())
    kept = [priced(question, one(job, row), cluster) for _, _, job, row in best[:top]]
    return searched, Counter({why: n for why, n in rejected.items() if n}), kept, least


def _group(
    question: Question, cluster: Cluster, by: str, top: int, distinct: bool, job: Job
) -> tuple[Counter[str], tuple[float, str] | None, list[Entry]]:
    """The layouts of one job: why some are rejected, the least memory any needs, the best of the rest."""
    rejected = Counter[str]()
    short = question.model.n_layers / np.asarray(job.layout.pp) < job.recompute_every
    rejected[NO_BLOCKS] += int(np.count_nonzero(short))
    keep = np.flatnonzero(~short)
    if not len(keep):
        return rejected, None, []
    job = _some(job, keep)
    device = np.broadcast_to(rank_memory(job, cluster).device_bytes, keep.shape)
    at = int(np.argmin(device))
    least = (float(device[at]), f"{_words(one(job, at))} on {cluster.name}")
    fits = device <= cluster.accelerator.usable_bytes
    rejected[NO_MEMORY] += int(np.count_nonzero(~fits))
    keep = np.flatnonzero(fits)
    if not len(keep):
        return rejected, least, []
    job, device = _some(job, keep), device[keep]
    seconds = np.broadcast_to(step_time(job, cluster).seconds, keep.shape)
    good = np.ones(len(keep), dtype=bool)
    if question.tokens is not None:
        run = np.ceil(question.tokens / np.asarray(job.tokens)) * seconds
        rate = price_of(cluster.accelerator, question.usd_per_gpu_hour) or 0.0
        for reason, bad in (
            (NO_TIME, run > (question.days or math.inf) * SECONDS_PER_DAY),
            (NO_MONEY, cluster.count * run / 3600 * rate > (question.budget_usd or math.inf)),
        ):
            rejected[reason] += int(np.count_nonzero(bad & good))
            good &= ~bad
    rank = np.where(good, device if by == "memory" else seconds / np.asarray(job.tokens), np.inf)
    order = np.lexsort((device, _significant(rank)))
    if distinct:
        order = order[np.sort(np.unique(_division(job)[order], return_index=True)[1])]
    return (
        rejected,
        least,
        [(float(rank[i]), float(device[i]), job, int(i)) for i in order[:top] if np.isfinite(rank[i])],
    )


def _some(job: Job, rows: Any) -> Job:
    """A job of some of a job's layouts."""
    lay = job.layout
    layout = replace(lay, **{a: np.asarray(getattr(lay, a))[rows] for a in AXES[:10]})
    return replace(
        job, layout=layout,
        micro_batch=np.asarray(job.micro_batch)[rows], micro_batches=np.asarray(job.micro_batches)[rows],
    )  # fmt: skip


def _division(job: Job) -> Array:
    """One number for each way the ranks are divided: dp, tp, pp, cp, ep."""
    code = np.zeros(np.shape(job.micro_batch), dtype=np.int64)
    for axis in ("dp", "tp", "pp", "cp", "ep"):
        code = code * 4093 + np.asarray(getattr(job.layout, axis))
    return code


def _significant(values: Array) -> Array:
    """To seven digits: what differs by less is equal, and the one with less memory wins."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = 10.0 ** (6 - np.floor(np.log10(values)))
        return np.where(np.isfinite(values) & (values > 0), np.rint(values * scale) / scale, values)


def priced(question: Question, job: Job, cluster: Cluster) -> Choice:
    """One layout with memory, time, days, dollars and energy."""
    took, held = step_time(job, cluster), rank_memory(job, cluster)
    steps = seconds = usd = kwh = None
    step_seconds, peak = float(took.seconds), float(held.peak_bytes)
    if question.tokens is not None:
        steps = math.ceil(question.tokens / int(job.tokens))
        seconds = steps * step_seconds
        usd, kwh = spent(cluster, seconds, question.usd_per_gpu_hour)
    return Choice(
        cluster, job, step_seconds, float(took.mfu), peak, float(held.device_bytes),
        {k: float(v) for k, v in took.parts.items()}, {k: float(v) for k, v in held.parts.items()},
        steps, seconds, usd, kwh,
        _interval(job, cluster, "step_time", step_seconds), _interval(job, cluster, "peak_memory", peak),
    )  # fmt: skip


def _interval(job: Job, cluster: Cluster, target: str, value: float) -> tuple[float, float]:
    """The 80 % interval around a forecast, from the errors on published runs of its kind."""
    found = factors(job, cluster, target)
    return value * found.low, value * found.high


# ---- several clusters


def counts(low: int, high: int, node: int) -> list[int]:
    """Numbers of accelerators between ``low`` and ``high`` worth a look: whole nodes, powers of two and 3/2 of them.

    >>> counts(64, 512, 8)
    [64, 96, 128, 192, 256, 384, 512]
    """
    if low > high:
        raise BadInput(f"a range from {low} to {high} is empty; give the smaller number first")
    steps = {low, high}
    for k in range(high.bit_length() + 1):
        steps |= {1 << k, 3 << k}
    return sorted(n for n in steps if low <= n <= high and (n % node == 0 or n < node or n in (low, high)))


# ---- words


def why(winner: Choice, other: Choice) -> list[tuple[str, float]]:
    """The parts of a step by which ``other`` is slower, or faster, in seconds per step of the winner's tokens."""
    scale = winner.batch_tokens * winner.cluster.count / (other.batch_tokens * other.cluster.count)
    parts = {name: other.time[name] * scale - winner.time[name] for name in winner.time}
    return sorted(((n, s) for n, s in parts.items() if abs(s) > 1e-4 * winner.step_seconds), key=lambda p: -abs(p[1]))


def _words(job: Job) -> str:
    """A layout in a few words: what is 1 is left out."""
    lay = job.layout
    said = [f"{a}={int(getattr(lay, a))}" for a in ("dp", "tp", "pp", "cp", "ep") if getattr(lay, a) > 1] or ["dp=1"]
    said += [f"zero-{int(lay.zero_stage)}"] * bool(lay.zero_stage)
    return f"{' '.join(said)}, micro-batch {int(job.micro_batch)}, recompute {job.recompute}"


def _notes(question: Question, best: Sequence[Choice]) -> tuple[str, ...]:
    """What the answer takes for granted."""
    said = list(question.notes)
    if best:
        asked, made = question.batch * question.seq_len, best[0].batch_tokens
        if made != round(asked):
            said.append(
                f"a batch of {format_count(asked)} tokens is {question.batch:.6g} sequences; the first layout's is "
                f"rounded to {int(best[0].job.samples)}, {format_count(made)} tokens, which divides"
            )
        device = best[0].cluster.accelerator
        said.extend(device.assumptions)
        if best[0].usd is not None and question.usd_per_gpu_hour is None:
            said.append(
                f"price: {format_usd(device.usd_per_gpu_hour)} per GPU-hour of {device.name}, {device.price_source}, "
                f"{device.price_date}"
            )
        said.extend(step_time(best[0].job, best[0].cluster).assumptions)
    if best:
        for target, what in (("step_time", "step"), ("peak_memory", "peak")):
            known = factors(best[0].job, best[0].cluster, target)
            runs = f"the errors on {known.rows} published runs, those like it weighing more ({', '.join(known.tables)})"
            said.append(
                f"80 % interval of the {what}: {runs if known.tables else 'no published run is at hand; a guess'}"
            )
    said.append(
        f"{question.framework}'s habits, {question.attention} attention, {question.optimizer}; "
        f"{', '.join(question.precisions)}"
    )
    return tuple(dict.fromkeys(said))


def _nearest(
    question: Question, clusters: Sequence[Cluster], rejected: Mapping[str, int], least: tuple[float, str] | None
) -> str:
    """Where nothing is feasible: what comes nearest."""
    if rejected.get(NO_TIME) or rejected.get(NO_MONEY):
        free = replace(question, days=None, budget_usd=None)
        plan = search(free, clusters, "time" if rejected.get(NO_TIME) else "cost", 1)
        if plan.layouts:
            found = plan.layouts[0]
            cost = "" if found.usd is None else f" and costs {format_usd(found.usd)}"
            return f"nearest: {_words(found.job)} on {found.cluster.name} takes {found.days:.4g} days{cost}"
    if least is not None:
        device = max((c.accelerator for c in clusters), key=lambda a: a.usable_bytes)
        said = (
            f"the least is {format_bytes(least[0])} per device, {least[1]}, and {device.name} has "
            f"{format_bytes(device.usable_bytes)}"
        )
        enough = _enough(question, clusters[-1])
        return f"{said}; nearest that fits: {enough}" if enough else f"{said}; take a device with more memory"
    if rejected.get(NO_BATCH):
        return f"nearest: a batch of {_nearest_batch(question, clusters)} sequences divides on {clusters[0].name}"
    return "no layout divides; free an axis of --layout, or change the number of accelerators"


def _enough(question: Question, cluster: Cluster) -> str:
    """The least doubling of a cluster on which something fits, in words; empty where none does."""
    free = replace(question, days=None, budget_usd=None)
    count = cluster.count
    while (count := 2 * count) <= _MOST_TRIED:
        if set(question.fixed) & {"dp"}:  # more ranks than the layout has would be left over
            free = replace(free, fixed={a: n for a, n in free.fixed.items() if a != "dp"})
        _, _, kept, _ = _on(free, replace(cluster, count=count), "memory", 1)
        if kept:
            return f"{count}x{cluster.accelerator.name} with {_words(kept[0].job)}"
    return ""


def _nearest_batch(question: Question, clusters: Sequence[Cluster]) -> int:
    for slack in range(1, 10**6):
        for batch in (round(question.batch) + slack, round(question.batch) - slack):
            if batch >= 1 and len(
                enumerate_layouts(replace(question, batch=float(batch)), clusters[0].count).columns["dp"]
            ):
                return batch
    return clusters[0].count


# ---- arithmetic


def _divisors(n: int) -> list[int]:
    """Ascending.

    >>> _divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low)})


def _powers(limit: int) -> list[int]:
    return [1 << k for k in range(limit.bit_length())]


def _axis(fixed: Mapping[str, int | tuple[int, ...]], name: str, free: list[int]) -> list[int]:
    given = fixed.get(name)
    if isinstance(given, int):
        return [given]
    return free if given is None else [value for value in free if value in given]


def _known(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise UnknownName(what, name, known)


def require(plan: Plan) -> Plan:
    """The plan itself. Raises NoAnswer where nothing is feasible, with the reasons and what comes nearest."""
    if plan.layouts:
        return plan
    raise NoAnswer(f"none of {plan.searched:,} combinations will do; {plan.nearest}")
