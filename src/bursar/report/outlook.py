"""One choice of layout as figures of a page, each with what may be asked of it: interval, formula, inputs, source.

Nothing is priced here: what `plan` answered is put into words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from bursar.hardware import dtype_name
from bursar.plan.intervals import factors
from bursar.plan.search import Choice, Plan, Question, why
from bursar.plan.usual import pulled
from bursar.run import price_of
from bursar.step_time import flops, parameters
from bursar.units import format_bytes, format_count, format_rate, format_seconds, format_usd

MEMORY = {  # parts of a rank's memory, in words
    "parameters": "as the rank holds them",
    "gradients": "as they are accumulated",
    "optimizer_state": "with the fp32 master copy",
    "activations": "kept for backward, of all micro-batches in flight",
    "logits": "of the loss, on the last stage",
    "temporary": "of the block at work at the peak",
    "collective_buffers": "gathered parameters, what is sent",
    "workspaces": "of cuBLAS and Transformer Engine",
    "inputs": "tokens, labels, masks",
    "outside": "what the allocator holds beyond the peak, the CUDA context, NCCL",
}
TIME = {  # parts of a step, in words; what is sent counts as far as nothing hides it
    "compute": "matrix products",
    "attention": "fused attention",
    "memory_bound": "norms, activations, what streams through memory",
    "overhead": "kernels too short for their launch",
    "tp": "tensor parallelism's collectives, exposed",
    "cp": "context parallelism's, exposed",
    "ep": "the experts' all-to-all, exposed",
    "dp": "gradients and parameters, exposed",
    "pp_send": "from stage to stage, exposed",
    "bubble": "stages that wait for one another",
    "optimizer": "the update",
}


NAMES = {  # of parts whose key is a letter or two
    "tp": "tensor parallel", "cp": "context parallel", "ep": "expert parallel", "dp": "data parallel",
    "pp_send": "pipeline sends", "bubble": "pipeline bubble",
}  # fmt: skip
LABELS = {  # of each figure: how it is called, and how it is written
    "time": ("Time", "seconds"), "usd": ("Cost", "usd"), "mfu": ("MFU", "share"), "memory": ("Memory per GPU", "bytes"),
    "step": ("One step", "seconds"), "hours": ("GPU-hours", "hours"), "kwh": ("Energy", "kwh"),
    "rate": ("Tokens/s per GPU", "rate"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Input:
    """What went into a figure, and where it is from."""

    name: str
    value: str
    source: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number of the page. ``kind`` says how it is written; without a value, ``missing`` says why there is none."""

    key: str
    label: str
    kind: str  # seconds, bytes, usd, share, hours, kwh, rate
    value: float | None
    low: float | None = None  # of the 80 % interval
    high: float | None = None
    formula: str = ""
    inputs: tuple[Input, ...] = ()
    source: str = ""
    missing: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a whole: of a rank's memory in bytes, of a step in seconds."""

    name: str
    value: float
    share: float
    says: str = ""


def named(part: str) -> str:
    """A part's name in words.

    >>> named("tp"), named("optimizer_state")
    ('tensor parallel', 'optimizer state')
    """
    return NAMES.get(part, part.replace("_", " "))


def layout_words(choice: Choice) -> tuple[str, str]:
    """The layout in two lines: how ranks share the work, and how each does its part. What is 1 is left out."""
    lay, job = choice.job.layout, choice.job
    said = [f"{a} {int(getattr(lay, a))}" for a in ("dp", "tp", "pp", "cp", "ep") if getattr(lay, a) > 1]
    how = [f"ZeRO-{int(lay.zero_stage)}"] * bool(lay.zero_stage)
    how += [f"in groups of {int(lay.fsdp)}"] * (lay.fsdp > 1)
    how += ["kept gathered"] * (lay.zero_stage == 3 and not lay.reshard_after_forward)
    how += ["sequence parallel"] * bool(lay.sequence_parallel)
    how += [f"{int(lay.virtual_stages)} virtual stages"] * (lay.virtual_stages > 1)
    how += [f"micro-batch {int(job.micro_batch)}"]
    how += ["no recompute" if choice.recompute == "none" else f"{choice.recompute} recompute"]
    return " · ".join(said or ["one device"]), ", ".join(how)


def memory_parts(choice: Choice) -> tuple[Part, ...]:
    """The fullest rank's memory by part, what stands outside the peak last; they add up to ``device_bytes``."""
    return _parts({**choice.memory, "outside": choice.device_bytes - choice.peak_bytes}, MEMORY)


def time_parts(choice: Choice) -> tuple[Part, ...]:
    """The step's seconds by part; they add up to ``step_seconds``."""
    return _parts(choice.time, TIME)


def _parts(values: Mapping[str, float], words: Mapping[str, str]) -> tuple[Part, ...]:
    whole = sum(values.values())
    names = [n for n in words if n in values] + [n for n in values if n not in words]
    return tuple(Part(n, values[n], values[n] / whole, words.get(n, "")) for n in names if values[n] > 0)


def against(best: Choice, other: Choice) -> str:
    """The part of a step by which ``other`` is slowest against ``best``, for the same tokens; nothing where none is."""
    for name, seconds in why(best, other):
        if seconds > 0:
            return f"{named(name)} +{format_seconds(seconds)}"
    return ""


@dataclass(frozen=True, slots=True)
class Change:
    """One lever alone on a choice: the memory and time of the whole after it, and how far that is from before."""

    name: str
    title: str
    source: str
    same_mathematics: bool
    missing: str = ""  # why it changes nothing here
    device_bytes: float = 0.0
    more_bytes: float = 0.0
    token_seconds: float = 0.0
    slower: float = 0.0  # share of the time per token
    fits: bool = False


def changes(choice: Choice) -> tuple[Change, ...]:
    """Each lever alone on ``choice``."""
    base, rows = pulled(choice)
    found = []
    for row in rows:
        lever, outcome = row.lever, row.outcome
        made = Change(lever.name, lever.title, lever.source, lever.same_mathematics, row.why)
        if outcome is not None:
            made = replace(
                made, device_bytes=outcome.device_bytes, more_bytes=outcome.device_bytes - base.device_bytes,
                token_seconds=outcome.token_seconds, slower=outcome.token_seconds / base.token_seconds - 1,
                fits=outcome.device_bytes <= choice.cluster.accelerator.usable_bytes,
            )  # fmt: skip
        found.append(made)
    return tuple(found)


def verdict(choice: Choice) -> tuple[str, str]:
    """("yes", "perhaps" or "no", the sentence): whether the fullest rank's memory is within what the driver shows."""
    usable, held = choice.cluster.accelerator.usable_bytes, choice.device_bytes
    of = f"{format_bytes(held)} of the {format_bytes(usable)} of each {choice.cluster.accelerator.name}"
    if held > usable:
        return "no", f"Does not fit: {of}, {format_bytes(held - usable)} too much."
    high = _ranges(choice)["memory"][2]
    if high is not None and high > usable:
        return "perhaps", f"Fits: {of}. The interval reaches {format_bytes(high)}, so try it before you rely on it."
    return "yes", f"Fits: {of}, and so does the whole interval."


LABELS = {  # of each figure: how it is called, and how it is written
    "time": ("Time", "seconds"), "usd": ("Cost", "usd"), "mfu": ("MFU", "share"), "memory": ("Memory per GPU", "bytes"),
    "step": ("One step", "seconds"), "hours": ("GPU-hours", "hours"), "kwh": ("Energy", "kwh"),
    "rate": ("Tokens/s per GPU", "rate"),
}  # fmt: skip


def figures(choice: Choice, question: Question) -> dict[str, Figure]:
    """The figures by key, in the order of `LABELS`, each with its reasons."""
    reasons = {
        "time": _time(choice, question), "usd": _usd(choice, question), "mfu": _mfu(choice), "memory": _memory(choice),
        "step": _step(choice), "hours": _hours(choice), "kwh": _kwh(choice), "rate": _rate(choice),
    }  # fmt: skip
    found = {}
    for key, figure in brief(choice).items():
        why = reasons[key]
        if figure.value is None:
            found[key] = replace(figure, missing=why.missing)
        else:
            found[key] = replace(figure, formula=why.formula, inputs=why.inputs, source=why.source)
    return found


def brief(choice: Choice) -> dict[str, Figure]:
    """The same without their reasons: for a row of a table, whose own page has them."""
    return {key: Figure(key, *LABELS[key], *values) for key, values in _ranges(choice).items()}


def _ranges(choice: Choice) -> dict[str, tuple[float | None, float | None, float | None]]:
    """Each figure's value and its 80 % interval: time's for what grows with the step, its inverse for rates."""
    step, outside = choice.step_seconds, choice.device_bytes - choice.peak_bytes
    low, high = (bound / step for bound in choice.step_interval)

    def grows(value: float | None) -> tuple[float | None, float | None, float | None]:
        return (None, None, None) if value is None else (value, value * low, value * high)

    def shrinks(value: float, most: float) -> tuple[float | None, float | None, float | None]:
        return value, value / high, min(most, value / low)

    memory = tuple(bound + outside for bound in choice.peak_interval)
    return {
        "time": grows(choice.seconds), "usd": grows(choice.usd), "mfu": shrinks(choice.mfu, 1.0),
        "memory": (choice.device_bytes, memory[0], memory[1]), "step": grows(step), "hours": grows(_gpu_hours(choice)),
        "kwh": grows(choice.kwh), "rate": shrinks(choice.tokens_per_gpu_second, math.inf),
    }  # fmt: skip


def _gpu_hours(choice: Choice) -> float | None:
    return None if choice.seconds is None else choice.cluster.count * choice.seconds / 3600


def assumptions(choice: Choice, question: Question, plan: Plan) -> tuple[str, ...]:
    """What the figures take for granted."""
    said = []
    tokens = question.batch * question.seq_len
    if choice.batch_tokens != round(tokens):
        said.append(
            f"a step of {format_count(tokens)} tokens is rounded to {choice.batch_tokens:,}, which divides: "
            f"{int(choice.job.samples):,} sequences"
        )
    said += [*choice.cluster.accelerator.assumptions, *plan.assumptions]
    said.append(
        f"{question.framework} as the framework: its bytes per gradient and state, its padding, its habits of overlap; "
        f"{question.attention} attention, {question.optimizer}"
    )
    return tuple(dict.fromkeys(said))


def ratio(a: Figure, b: Figure) -> float | None:
    """``b`` over ``a``, where both are there."""
    return b.value / a.value if a.value and b.value is not None else None


@dataclass(frozen=True, slots=True)
class Why:
    """What may be asked of a figure, or why there is none."""

    formula: str
    inputs: tuple[Input, ...] = ()
    source: str = ""
    missing: str = ""


def _learnt(choice: Choice, target: str) -> str:
    by = factors(choice.job, choice.cluster, target)
    if not by.tables:
        return "80 % interval: no published runs are known here, so ±50 % is taken"
    return (
        f"80 % interval: {by.low:.2f} to {by.high:.2f} times the forecast, from the errors on {by.rows} published runs "
        f"({', '.join(by.tables)})"
    )


def _time(choice: Choice, question: Question) -> Why:
    return Why(
        "tokens of the run / tokens of a step × seconds of a step",
        (
            Input("tokens of the run", format_count(question.tokens), "asked for"),
            Input("tokens of a step", f"{choice.batch_tokens:,}", "micro-batch × micro-batches × dp × sequence"),
            Input("steps", format_count(choice.steps), "rounded up"),
            Input("seconds of a step", format_seconds(choice.step_seconds), "see One step"),
        ),
        "Without restarts, evaluation and checkpoints. " + _learnt(choice, "step_time"),
        "the tokens of the run are not given",
    )


def _usd(choice: Choice, question: Question) -> Why:
    device = choice.cluster.accelerator
    price = price_of(device, question.usd_per_gpu_hour)
    given = question.usd_per_gpu_hour is not None
    return Why(
        "GPU-hours × price",
        (
            Input("GPU-hours", format_count(_gpu_hours(choice)), "see GPU-hours"),
            Input("price", f"{format_usd(price)} per GPU-hour",
                  "asked for" if given else f"{device.price_source}, {device.price_date}"),
        ),
        _learnt(choice, "step_time"),
        f"the catalogue has no price for {device.name}; give yours",
    )  # fmt: skip


def _mfu(choice: Choice) -> Why:
    job, device = choice.job, choice.cluster.accelerator
    dtype = _dtype(job.precision, device.peak_flops_per_s)
    one, samples = flops(job).model, int(job.samples)
    return Why(
        "model FLOPs of a step / (accelerators × dense peak × seconds of a step)",
        (
            Input("model FLOPs of a step", f"{one * samples:.4g}",
                  f"{samples:,} sequences of {one:.4g}: products, and attention as the mask lets through"),
            Input("parameters", format_count(parameters(job.model)), "counted from the model's shape"),
            Input("accelerators", f"{choice.cluster.count:,}", "asked for"),
            Input(f"dense peak in {dtype}", format_rate(device.peak(dtype), "FLOP"),
                  device.sources.get("peak_flops_per_s", "")),
            Input("seconds of a step", format_seconds(choice.step_seconds), "see One step"),
        ),
        _learnt(choice, "step_time"),
    )  # fmt: skip


def _dtype(precision: str, peaks: Mapping[str, float]) -> str:
    plain = dtype_name({"mxfp8": "fp8", "nvfp4": "fp4"}.get(precision, precision))
    return plain if plain in peaks else "bf16"


def _memory(choice: Choice) -> Why:
    device = choice.cluster.accelerator
    return Why(
        "the sum of the parts on the fullest rank",
        (
            Input("allocated at the peak", format_bytes(choice.peak_bytes), "see the bar below"),
            Input("outside", format_bytes(choice.device_bytes - choice.peak_bytes), MEMORY["outside"]),
            Input("usable", format_bytes(device.usable_bytes),
                  device.sources.get("usable_memory_bytes") or device.sources.get("memory_bytes", "")),
        ),
        "Of the fullest rank. " + _learnt(choice, "peak_memory"),
    )  # fmt: skip


def _step(choice: Choice) -> Why:
    return Why(
        "the sum of the parts, on the slowest rank, as far as nothing hides them",
        tuple(Input(named(p.name), format_seconds(p.value), p.says) for p in time_parts(choice)),
        "Efficiencies and networks: catalog/coefficients.toml, from datasheets and published microbenchmarks, none "
        "fitted to a step. " + _learnt(choice, "step_time"),
    )


def _hours(choice: Choice) -> Why:
    return Why(
        "accelerators × hours",
        (Input("accelerators", f"{choice.cluster.count:,}", "asked for"),
         Input("time", format_seconds(choice.seconds), "see Time")),
        _learnt(choice, "step_time"),
        "the tokens of the run are not given",
    )  # fmt: skip


def _kwh(choice: Choice) -> Why:
    device = choice.cluster.accelerator
    return Why(
        "accelerators × board power × hours × PUE",
        (Input("board power", "n/a" if device.tdp_watts is None else f"{device.tdp_watts:g} W",
               device.sources.get("tdp_watts", "")),
         Input("PUE", "1.0", "assumed: the building's own use is not in it, nor are the hosts"),
         Input("GPU-hours", format_count(_gpu_hours(choice)), "see GPU-hours")),
        "At full board power throughout, which is an upper bound.",
        f"the catalogue has no board power for {device.name}",
    )  # fmt: skip


def _rate(choice: Choice) -> Why:
    return Why(
        "tokens of a step / seconds of a step / accelerators",
        (Input("tokens of a step", f"{choice.batch_tokens:,}", "micro-batch × micro-batches × dp × sequence"),
         Input("seconds of a step", format_seconds(choice.step_seconds), "see One step"),
         Input("accelerators", f"{choice.cluster.count:,}", "asked for")),
        _learnt(choice, "step_time"),
    )  # fmt: skip


def records(figures: Sequence[Figure]) -> dict[str, dict[str, object]]:
    """For JSON: value, interval and reasons of each figure by its key."""
    return {
        f.key: {
            "label": f.label, "value": f.value, "low_80": f.low, "high_80": f.high, "unit": f.kind,
            "formula": f.formula,
            "inputs": [{"name": i.name, "value": i.value, "source": i.source} for i in f.inputs],
            "source": f.source, "missing": f.missing or None,
        }
        for f in figures
    }  # fmt: skip
