"""Levers: what one change to a run does to memory and time, alone and together, for one model on one device or a few.

    LEVERS      one row each: what it changes, and the word for why it changes nothing here
    Case        a job, and what the levers did to it that a job cannot say
    measure     memory and seconds of a case, by `rank_memory` and `step_time`
    levers      each alone, the cheapest set that fits, the fewest, the largest batch, sequence and model

A lever of the mathematics (LoRA, a window, sparse gradients, half the batch) trains another thing; it is shown, and
left out of the sets that are named.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from bursar.errors import BadInput, UnknownName
from bursar.frameworks import framework
from bursar.hardware import Cluster
from bursar.jobs import Decoder, Job, Layout
from bursar.rank_memory import rank_memory
from bursar.step_time import parameters, step_time

FRAMEWORK: Final = "fsdp"  # fp32 parameters, gradients and states, 16-bit products; as PyTorch's DDP and FSDP have it
CHUNKS: Final = 8  # pieces a loss is cut into
RANK: Final = 16  # of LoRA's matrices: Hu et al. 2021 (arXiv:2106.09685), table 18, from 1 to 64
WINDOW: Final = 1024  # tokens
DENSITY: Final = 0.01  # share of the gradients sent: Aji and Heafield 2017 (arXiv:1704.05021)
HOST_ADAM_BYTES: Final = 28  # per parameter: gradient, parameter and two moments read, three of them written, fp32
SOCKET_BYTES_PER_S: Final = 100e9  # what one of the host's sockets sustains, and a host of two: assumed
HOST_BYTES_PER_S: Final = 200e9
INDEX_BYTES: Final = 4  # of one sent gradient's place


@dataclass(frozen=True, slots=True)
class Settings:
    """The numbers that levers take."""

    rank: int = RANK
    window: int = WINDOW
    density: float = DENSITY
    chunks: int = CHUNKS

    def __post_init__(self) -> None:
        for name in ("rank", "window", "chunks"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}; give 1 or more")
        if not 0 < self.density <= 1:
            raise BadInput(f"density is {self.density!r}; give a share above 0, up to 1")


@dataclass(frozen=True, slots=True)
class Case:
    """A job with factors on the parts of its time, and what the host takes."""

    job: Job
    time: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    host_seconds: float = 0.0  # of one step: bytes to the host and back, and the update there
    residual_bytes: float = 0.0  # what a lever keeps beside
    wire: float = 1.0  # factor on the bytes of gradients

    def flagged(self, time: Mapping[str, float] | None = None, **flags: float) -> Case:
        """With flags of the job that `rank_memory` knows, and factors on parts of the time, which multiply."""
        said = {name: f"{value:.12g}" for name, value in flags.items()}
        both = {name: self.time.get(name, 1.0) * (time or {}).get(name, 1.0) for name in {**self.time, **(time or {})}}
        return replace(self, job=replace(self.job, flags={**self.job.flags, **said}), time=MappingProxyType(both))


@dataclass(frozen=True, slots=True)
class Outcome:
    """Memory and time of one case, of the fullest rank."""

    peak_bytes: float
    device_bytes: float
    step_seconds: float
    tokens: int
    parts: Mapping[str, float] = field(hash=False)
    wire_bytes: float  # gradients and parameters that one rank sends in a step

    @property
    def token_seconds(self) -> float:
        """Seconds per token of the whole step."""
        return self.step_seconds / self.tokens


@dataclass(frozen=True, slots=True)
class Lever:
    """One row. ``apply`` returns the case after it, or in words why nothing changes here."""

    name: str
    title: str
    group: str  # of which at most one is pulled
    apply: Callable[[Case, Cluster, Settings], Case | str]
    source: str
    same_mathematics: bool = True


# ---- the rows


def _recompute(how: str, modules: tuple[str, ...] = ()) -> Callable[[Case, Cluster, Settings], Case | str]:
    def apply(case: Case, _: Cluster, __: Settings) -> Case | str:
        if how == "selective" and case.job.attention != "naive":
            return "flash attention stores no scores, so there are none to compute again"
        return replace(case, job=replace(case.job, recompute=how, recompute_modules=modules))

    return apply


def _flash(case: Case, _: Cluster, __: Settings) -> Case | str:
    return "on already" if case.job.attention == "flash" else replace(case, job=replace(case.job, attention="flash"))


def _window(case: Case, _: Cluster, settings: Settings) -> Case | str:
    if case.job.seq_len <= settings.window:
        return f"the sequence is no longer than the window of {settings.window}"
    model = replace(case.job.model, sliding_window=settings.window, windowed_every=1)
    return replace(case, job=replace(case.job, model=model, attention="flash"))


def _accumulate(case: Case, _: Cluster, __: Settings) -> Case | str:
    job = case.job
    if job.micro_batch == 1:
        return "the micro-batch is 1 already"
    return replace(case, job=replace(job, micro_batch=1, micro_batches=job.micro_batches * job.micro_batch))


def _half(case: Case, _: Cluster, __: Settings) -> Case | str:
    if case.job.micro_batch == 1:
        return "the micro-batch is 1 already"
    return replace(case, job=replace(case.job, micro_batch=case.job.micro_batch // 2))


def _bf16(case: Case, _: Cluster, __: Settings) -> Case | str:
    if case.job.precision == "fp32":
        return "the products are fp32; choose --precision bf16 first"
    return case.flagged({"optimizer": 0.5}, bf16_states=1)


def _eight_bit(case: Case, _: Cluster, __: Settings) -> Case | str:
    if case.job.optimizer not in ("adam", "adamw"):
        return f"{case.job.optimizer} has no 8-bit form in the catalogue"
    return replace(case, job=replace(case.job, optimizer="adamw-8bit"))


def _fused_update(case: Case, _: Cluster, __: Settings) -> Case | str:
    return case.flagged(fused_update=1)


def _fused_loss(case: Case, _: Cluster, __: Settings) -> Case | str:
    return case.flagged(logit_bytes=4)  # the logits and their gradient, 16 bit each


def _chunked_loss(case: Case, _: Cluster, settings: Settings) -> Case | str:
    return case.flagged(loss_chunks=settings.chunks)


def _zero(stage: int) -> Callable[[Case, Cluster, Settings], Case | str]:
    def apply(case: Case, on: Cluster, __: Settings) -> Case | str:
        if on.count == 1:
            return "one device: there is nothing to shard over"
        return replace(case, job=replace(case.job, layout=replace(case.job.layout, zero_stage=stage)))

    return apply


def _offload(case: Case, on: Cluster, __: Settings) -> Case | str:
    if on.accelerator.pcie_bytes_per_s is None:
        return f"the catalogue has no link from {on.accelerator.name} to its host"
    own = parameters(case.job.model) / (on.count if int(case.job.layout.zero_stage) >= 1 else 1)
    crossing = 2 * 2 * own  # bf16 gradients down, bf16 parameters up
    moved = HOST_ADAM_BYTES * own
    here = min(on.count, on.node_size)
    update = max(moved / SOCKET_BYTES_PER_S, moved * here / HOST_BYTES_PER_S)
    more = crossing / on.accelerator.pcie_bytes_per_s + update
    return replace(case.flagged({"optimizer": 0.0}, offload_states=1), host_seconds=case.host_seconds + more)


def _lora(case: Case, _: Cluster, settings: Settings) -> Case | str:
    share = lora_parameters(case.job.model, settings.rank) / parameters(case.job.model)
    # of three products forward, dX, dW the last is gone, but for the small matrices'
    return case.flagged({"compute": (2 + share) / 3, "optimizer": share, "dp": share}, trainable=share)


def _compile(case: Case, _: Cluster, __: Settings) -> Case | str:
    return replace(case, job=replace(case.job, compiled=True))


def _sparse(case: Case, on: Cluster, settings: Settings) -> Case | str:
    if on.count == 1:
        return "one device sends no gradients"
    if int(case.job.layout.zero_stage) >= 2:
        return "sharded gradients are reduce-scattered; a sparse all-gather would undo it"
    factor = settings.density / break_even_density(case.job, on)
    kept = parameters(case.job.model) * framework(case.job.framework).gradient_bytes.get(case.job.precision, 4.0)
    return replace(case.flagged({"dp": factor}), wire=case.wire * factor, residual_bytes=case.residual_bytes + kept)


def _compress(case: Case, on: Cluster, __: Settings) -> Case | str:
    if on.count == 1:
        return "one device sends no gradients"
    factor = 2 / framework(case.job.framework).gradient_bytes.get(case.job.precision, 4.0)
    if factor >= 1:
        return "gradients are 16 bit already"
    return replace(case.flagged({"dp": factor}), wire=case.wire * factor)


LEVERS: Final = (
    Lever("checkpointing", "every block computed again in backward", "recompute", _recompute("full"),
          "Chen et al. 2016 (arXiv:1604.06174)"),
    Lever("selective-checkpointing", "the attention core computed again", "recompute", _recompute("selective"),
          "Korthikanti et al. 2022 (arXiv:2205.05198), section 5"),
    Lever("sequence-chunking", "feed-forwards by pieces of the sequence, again in backward", "recompute",
          _recompute("selective_op", ("mlp",)), "Bekman et al. 2025 (arXiv:2506.13996), tiled MLP"),
    Lever("flash-attention", "scores never stored", "attention", _flash, "Dao et al. 2022 (arXiv:2205.14135)"),
    Lever("accumulation", "micro-batches of 1, the same batch", "batch", _accumulate, "the sum of a step's gradients"),
    Lever("bf16-states", "parameters, gradients and states in bf16", "states", _bf16,
          "2 + 2 + 4 bytes per parameter in place of 4 + 4 + 8"),
    Lever("8bit-states", "Adam's two moments in 8 bits", "moments", _eight_bit,
          "Dettmers et al. 2021 (arXiv:2110.02861)"),
    Lever("fused-optimizer", "an update in one kernel, without temporaries", "moments", _fused_update,
          "torch.optim.AdamW(fused=True); its default works on lists of tensors and makes one more of them"),
    Lever("fused-loss", "cross-entropy without fp32 copies of the logits", "loss", _fused_loss,
          "Hsu et al. 2024 (arXiv:2410.10989): the gradient in the logits' place"),
    Lever("chunked-loss", "logits by pieces, never all of them", "loss", _chunked_loss,
          "Hsu et al. 2024 (arXiv:2410.10989); Wijmans et al. 2024 (arXiv:2411.09009)"),
    Lever("zero-1", "states sharded over the devices", "zero", _zero(1), "Rajbhandari et al. 2020, section 5.1"),
    Lever("zero-2", "and gradients", "zero", _zero(2), "Rajbhandari et al. 2020, section 5.2"),
    Lever("zero-3", "and parameters (FSDP)", "zero", _zero(3), "Rajbhandari et al. 2020, section 5.3"),
    Lever("cpu-offload", "states and their update on the host", "offload", _offload,
          "Ren et al. 2021 (arXiv:2101.06840); the host's memory at 200 GB/s, assumed"),
    Lever("compile", "elementwise kernels fused", "compile", _compile,
          "torch.compile: FLOPs stay; what it saves of memory is not counted"),
    Lever("smaller-batch", "half the micro-batch, half the tokens of a step", "batch", _half,
          "activations are linear in it", same_mathematics=False),
    Lever("windowed-attention", "each token sees the last W", "attention", _window,
          "Beltagy et al. 2020 (arXiv:2004.05150)", same_mathematics=False),
    Lever("lora", "a frozen 16-bit model, low-rank matrices trained", "states", _lora,
          "Hu et al. 2021 (arXiv:2106.09685); its own activations are not counted", same_mathematics=False),
    Lever("sparse-gradients", "the largest gradients sent, the rest kept back", "wire", _sparse,
          "Aji and Heafield 2017 (arXiv:1704.05021); Lin et al. 2017 (arXiv:1712.01887)", same_mathematics=False),
    Lever("bf16-gradients-sent", "gradients rounded before they are sent", "wire", _compress, "2 bytes in place of 4",
          same_mathematics=False),
)  # fmt: skip


def lever(name: str) -> Lever:
    """The row called ``name``. Raises UnknownName."""
    for row in LEVERS:
        if row.name == name.strip().lower():
            return row
    raise UnknownName("lever", name, [row.name for row in LEVERS])


def lora_parameters(model: Decoder, rank: int) -> int:
    """Parameters of LoRA's two matrices beside each linear layer of the blocks: rank · (in + out) each."""
    d, q, kv = model.d_model, model.query_width, model.n_kv_heads * model.head_dim
    attention = (d + q) + 2 * (d + kv) + (model.value_width + d)
    wide = 3 if model.gated_mlp else 2
    moe = model.n_moe_layers
    mlps = (model.n_layers - moe) * wide * (d + model.d_ff) + moe * model.n_experts * wide * (d + model.moe_d_ff)
    return rank * (model.n_layers * attention + mlps)


def break_even_density(job: Job, on: Cluster) -> float:
    """The share of gradients below which sending values with their places beats the dense all-reduce.

    Dense: 2(n-1)/n · P · g bytes per rank. Sparse: an all-gather of n ranks' d · P values and 4-byte indices,
    (n-1) · d · P · (g+4). They meet at d = 2g / (n(g+4)): more ranks, less density.
    """
    g = framework(job.framework).gradient_bytes.get(job.precision, 4.0)
    return 2 * g / (on.count * (g + INDEX_BYTES))


# ---- what a case takes


@lru_cache(maxsize=4096)
def _memory(job: Job, on: Cluster) -> Any:
    return rank_memory(job, on)


@lru_cache(maxsize=4096)
def _time(job: Job, on: Cluster) -> Any:
    return step_time(job, on)


def held(case: Case, on: Cluster) -> tuple[float, float, dict[str, float]]:
    """Peak and device bytes of the fullest rank, and the peak's parts."""
    found, more = _memory(case.job, on), case.residual_bytes
    parts = {name: float(n) for name, n in found.parts.items()} | ({"residual": more} if more else {})
    return float(found.peak_bytes) + more, float(found.device_bytes) + more, parts


def measure(case: Case, on: Cluster) -> Outcome:
    """Memory and seconds of one step of a case."""
    peak, device, parts = held(case, on)
    took = _time(case.job, on)
    seconds = sum(float(s) * case.time.get(name, 1.0) for name, s in took.parts.items())
    seconds += case.host_seconds
    return Outcome(peak, device, seconds, int(case.job.tokens), parts, float(took.collectives["dp"]) * case.wire)


def pull(case: Case, rows: Sequence[Lever], on: Cluster, settings: Settings) -> Case:
    """The case after each lever in turn; one that changes nothing is passed over."""
    for row in rows:
        after = row.apply(case, on, settings)
        case = case if isinstance(after, str) else after
    return case


# ---- the answer


@dataclass(frozen=True, slots=True)
class Pulled:
    """One lever alone."""

    lever: Lever
    outcome: Outcome | None  # None: it changes nothing here
    why: str = ""


@dataclass(frozen=True, slots=True)
class Set:
    """Several levers together."""

    names: tuple[str, ...]
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Largest:
    """How far a set of levers goes, one size at a time; 0 is none at all."""

    batch: int | None  # samples of one device; None: any, as they are accumulated
    seq_len: int
    parameters: int  # of the same model with more blocks, or fewer
    n_layers: int


@dataclass(frozen=True, slots=True)
class Levers:
    """What each change does, and which to take."""

    job: Job
    on: Cluster
    settings: Settings
    base: Outcome
    alone: tuple[Pulled, ...]
    cheapest: Set | None  # the least seconds per token that fits
    fewest: Set | None  # the fewest levers that fit
    together: Set  # the least memory
    largest: Mapping[str, Largest] = field(hash=False)  # base, cheapest, together
    break_even_density: float | None = None
    assumptions: tuple[str, ...] = ()

    @property
    def usable_bytes(self) -> int:
        """Of one device, as the driver shows it."""
        return self.on.accelerator.usable_bytes

    def fits(self, outcome: Outcome) -> bool:
        """Whether the device holds it."""
        return outcome.device_bytes <= self.usable_bytes

    def record(self) -> dict[str, Any]:
        """The fields of ``levers --json``."""

        def of(outcome: Outcome) -> dict[str, Any]:
            return {
                "peak_bytes": outcome.peak_bytes,
                "device_bytes": outcome.device_bytes,
                "saved_bytes": self.base.device_bytes - outcome.device_bytes,
                "step_seconds": outcome.step_seconds,
                "tokens": outcome.tokens,
                "slower": outcome.token_seconds / self.base.token_seconds - 1,
                "wire_bytes": outcome.wire_bytes,
                "fits": self.fits(outcome),
                "memory": dict(outcome.parts),
            }

        def named(chosen: Set | None) -> dict[str, Any] | None:
            return None if chosen is None else {"levers": list(chosen.names), **of(chosen.outcome)}

        return {
            "model": self.job.model.name,
            "accelerator": self.on.accelerator.name,
            "gpus": self.on.count,
            "micro_batch": int(self.job.micro_batch),
            "seq_len": self.job.seq_len,
            "usable_bytes": self.usable_bytes,
            "base": of(self.base),
            "levers": [
                {
                    "name": row.lever.name, "title": row.lever.title, "source": row.lever.source,
                    "same_mathematics": row.lever.same_mathematics, "applies": row.outcome is not None,
                    "why": row.why or None, **({} if row.outcome is None else of(row.outcome)),
                }
                for row in self.alone
            ],
            "cheapest": named(self.cheapest),
            "fewest": named(self.fewest),
            "together": named(self.together),
            "largest": {
                name: {"batch": x.batch, "seq_len": x.seq_len, "parameters": x.parameters, "n_layers": x.n_layers}
                for name, x in self.largest.items()
            },
            "break_even_density": self.break_even_density,
            "assumptions": list(self.assumptions),
        }  # fmt: skip


def levers(
    model: Decoder,
    on: Cluster,
    *,
    batch: int = 8,
    seq_len: int,
    precision: str = "bf16",
    optimizer: str = "adamw",
    attention: str = "naive",
    settings: Settings = Settings(),
    only: Sequence[str] = (),
) -> Levers:
    """Each lever alone on ``batch`` samples of ``seq_len`` tokens per device, and the sets worth naming.

    Without levers: PyTorch as it comes, data parallel over the devices, scores of attention stored, nothing computed
    again. Raises BadInput for sizes that cannot be, UnknownName for a lever in ``only`` that no row has.
    """
    if batch < 1 or seq_len < 1:
        raise BadInput(f"{batch} samples of {seq_len} tokens train nothing; give 1 or more of each")
    rows = tuple(lever(name) for name in only) or LEVERS
    job = Job(
        model, seq_len, Layout(dp=on.count), batch, 1,
        precision=precision, attention=attention, optimizer=optimizer, framework=FRAMEWORK,
    )  # fmt: skip
    base = Case(job)
    alone = []
    for row in rows:
        after = row.apply(base, on, settings)
        alone.append(Pulled(row, None, after) if isinstance(after, str) else Pulled(row, measure(after, on)))
    usable = on.accelerator.usable_bytes
    sets = list(_sets(base, rows, on, settings))
    device, token_seconds = _priced([pull(base, chosen, on, settings) for chosen in sets], on)
    names = [tuple(row.name for row in chosen) for chosen in sets]
    unhurried = np.round(token_seconds / measure(base, on).token_seconds, 6)  # what differs by less is as cheap

    def named_set(i: int) -> Set:
        return Set(names[i], measure(pull(base, sets[i], on, settings), on))

    fitting = [i for i in range(len(sets)) if device[i] <= usable]
    cheapest = fewest = None
    if fitting:
        cheapest = named_set(min(fitting, key=lambda i: (unhurried[i], len(sets[i]), device[i])))
        fewest = named_set(min(fitting, key=lambda i: (len(sets[i]), unhurried[i])))
    together = named_set(min(range(len(sets)), key=lambda i: (device[i], len(sets[i]))))
    named = {"base": (), "cheapest": None if cheapest is None else cheapest.names, "together": together.names}
    largest = {
        name: _largest(job, [lever(n) for n in names], on, settings)
        for name, names in named.items()
        if names is not None
    }
    return Levers(
        job, on, settings, measure(base, on), tuple(alone), cheapest, fewest, together, largest,
        break_even_density(job, on) if on.count > 1 else None,
        (
            f"without levers: fp32 parameters, gradients and states, {precision} products, {attention} attention, "
            f"{optimizer}, data parallel over {on.count}",
            "cpu-offload: an update at 200 GB/s of the host's memory, assumed; it hides behind nothing",
            *on.accelerator.assumptions,
        ),
    )  # fmt: skip


def _priced(cases: Sequence[Case], on: Cluster) -> tuple[Any, Any]:
    """Device bytes and seconds per token of each case: those that differ in what may be an array are one call."""
    device, seconds = np.zeros(len(cases)), np.zeros(len(cases))
    alike: dict[Job, list[int]] = {}
    timed: dict[Job, list[int]] = {}
    for i, case in enumerate(cases):
        job = replace(
            case.job, layout=replace(case.job.layout, zero_stage=0), micro_batch=1, micro_batches=1, compiled=False
        )
        alike.setdefault(job, []).append(i)
        timed.setdefault(replace(job, flags={}, compiled=case.job.compiled), []).append(i)
    for groups, into in ((alike, device), (timed, seconds)):
        for job, where in groups.items():
            at = np.array(where)
            jobs = [cases[i].job for i in where]
            many = replace(
                job,
                layout=replace(job.layout, zero_stage=np.array([int(x.layout.zero_stage) for x in jobs])),
                micro_batch=np.array([int(x.micro_batch) for x in jobs]),
                micro_batches=np.array([int(x.micro_batches) for x in jobs]),
            )
            if into is device:
                more = np.array([cases[i].residual_bytes for i in where])
                into[at] = np.broadcast_to(rank_memory(many, on).device_bytes, at.shape) + more
                continue
            took = step_time(many, on)
            for name, part in took.parts.items():
                into[at] += np.broadcast_to(part, at.shape) * np.array([cases[i].time.get(name, 1.0) for i in where])
            into[at] += np.array([cases[i].host_seconds for i in where])
            into[at] /= np.asarray(many.tokens)
    return device, seconds


def _sets(base: Case, rows: Sequence[Lever], on: Cluster, settings: Settings) -> Iterator[tuple[Lever, ...]]:
    """Every set of levers that keep the mathematics, one of a group at most, none that changes nothing."""
    groups: dict[str, list[Lever | None]] = {}
    for row in rows:
        if row.same_mathematics and not isinstance(row.apply(base, on, settings), str):
            groups.setdefault(row.group, [None]).append(row)
    for chosen in itertools.product(*groups.values()):
        pulled = tuple(row for row in chosen if row is not None)
        names = {row.name for row in pulled}
        if {"selective-checkpointing", "flash-attention"} <= names:
            continue
        yield pulled


def _largest(job: Job, rows: Sequence[Lever], on: Cluster, settings: Settings) -> Largest:
    """The largest micro-batch, sequence and depth that fit, each with the others as asked."""
    usable = on.accelerator.usable_bytes

    def fits(changed: Job) -> bool:
        return held(pull(Case(changed), rows, on, settings), on)[1] <= usable

    model = job.model
    long = replace(job, micro_batch=1)
    batch: int | None = _most(lambda b: fits(replace(job, micro_batch=b)), 1 << 20)
    if batch and any(row.name == "accumulation" for row in rows):
        batch = None
    positions = model.learned_positions or 1 << 23  # a table of positions ends there
    seq_len = 128 * _most(lambda n: 128 * n <= positions and fits(replace(long, seq_len=128 * n)), 1 << 16)
    deep = _most(lambda n: fits(replace(job, model=replace(model, n_layers=n + model.first_dense_layers))), 1 << 12)
    made = replace(model, n_layers=deep + model.first_dense_layers)
    return Largest(batch, seq_len, parameters(made) if deep else 0, made.n_layers if deep else 0)


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """The most for which ``fits`` holds, up to ``limit``; 0 where it holds for none.

    >>> _most(lambda n: n <= 37, 1024)
    37
    """
    if not fits(1):
        return 0
    low = 1
    while low < limit and fits(low * 2):
        low *= 2
    high = low * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
