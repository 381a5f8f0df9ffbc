"""The page of ``bursar plan``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from bursar.plan.search import Choice, Plan, why
from bursar.report.html.notebook import show
from bursar.report.text import line, note, table
from bursar.step_time import parameters
from bursar.units import format_bytes, format_count, format_seconds, format_share, format_usd

_MEMORY: Final = {"optimizer_state": "optimizer state", "collective_buffers": "collective buffers"}
_TIME: Final = {
    "compute": "products", "attention": "attention", "memory_bound": "streams", "overhead": "host",
    "tp": "tensor parallel", "cp": "context parallel", "ep": "expert parallel", "dp": "gradients, parameters",
    "pp_send": "between stages", "bubble": "bubble", "optimizer": "update",
}  # fmt: skip


def render(plan: Plan, *, explain: bool = False) -> Iterator[Any]:
    """The ranked layouts, the winner's time and memory, why the second loses, and what became of the rest."""
    question, model = plan.question, plan.question.model
    tokens = "" if question.tokens is None else f", {format_count(question.tokens)} tokens"
    yield line(
        f"{model.name}: {format_count(parameters(model))} parameters{tokens}, sequences of {question.seq_len}",
        style="bold",
    )
    if not plan.layouts:
        yield line(f"Nothing will do: none of {plan.searched:,} combinations.")
        yield line(plan.nearest)
        yield _rejected(plan)
        return
    names = {choice.cluster.name for choice in plan.layouts}
    several = len(names) > 1
    if not several:
        yield line(f"On {names.pop()}:")
    yield table(_title(plan), *_columns(plan, several))
    yield note(
        "dp replicas, z ZeRO stage (3 is FSDP; k parameters kept after forward; /group) · tp, s with sequence "
        "parallelism · pp stages × chunks · b×M micro-batch × how many · GB per device, of "
        f"{plan.layouts[0].cluster.accelerator.usable_bytes / 1e9:.1f}"
    )
    best = plan.layouts[0]
    yield _winner(best)
    yield note(f"allocated at its peak {format_bytes(best.peak_bytes)}, 80 %: " + _span(best.peak_interval))
    yield _times(best)
    if len(plan.layouts) > 1:
        yield from _runner_up(best, plan.layouts[1])
    if best.usd is not None or best.kwh is not None:
        yield from _run(best)
    yield _rejected(plan)
    if explain:
        yield from _explain(best)
    yield line("Assumptions", style="bold")
    for text in plan.assumptions:
        yield note(text)


def notebook(plan: Plan) -> str:
    """The ranked layouts as a notebook shows them; what became of the rest where there is none."""
    name = plan.question.model.name
    if not plan.layouts:
        return show(f"{name}: {plan.verdict}. {plan.nearest}", ("rejected", "combinations"),
                    [(why, f"{n:,}") for why, n in plan.rejected.items()])  # fmt: skip
    several = len({choice.cluster.name for choice in plan.layouts}) > 1
    return show(f"{name}: {_title(plan)}", *_columns(plan, several))


def _title(plan: Plan) -> str:
    by = {"time": "time", "cost": "cost", "memory": "memory left"}[plan.by]
    return f"By {by}: the first {len(plan.layouts)}; {plan.feasible:,} fit of {plan.searched:,} searched"


def _columns(plan: Plan, several: bool) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    run = plan.question.tokens is not None
    priced = several and all(choice.usd is not None for choice in plan.layouts)  # of one cluster, days say it
    head = ("on",) * several + ("layout", "b×M", "recompute", "step s", "80 %", "MFU %", "GB")
    rows = []
    for choice in plan.layouts:
        low, high = choice.step_interval
        row = (choice.cluster.name,) * several + (
            shorthand(choice), f"{choice.job.micro_batch}×{choice.job.micro_batches}", choice.recompute,
            f"{choice.step_seconds:.3g}", f"{low:.2g}–{high:.2g}", f"{100 * choice.mfu:.1f}",
            f"{choice.device_bytes / 1e9:.1f}",
        )  # fmt: skip
        if run:
            row += (f"{choice.days:.4g}",)
        if priced:
            row += (format_usd(choice.usd),)
        rows.append(row)
    head += ("days",) * run + ("cost",) * priced
    return head, rows


def shorthand(choice: Choice) -> str:
    """A layout in one word per axis; an axis of 1 is left out."""
    lay = choice.job.layout
    said = [f"dp{lay.dp}"]
    if lay.zero_stage:
        group = f"/{lay.fsdp}" if lay.fsdp > 1 else ""
        kept = "k" if lay.zero_stage == 3 and not lay.reshard_after_forward else ""
        said[0] += f"z{lay.zero_stage}{kept}{group}"
    if lay.tp > 1:
        said.append(f"tp{lay.tp}" + "s" * bool(lay.sequence_parallel))
    if lay.pp > 1:
        said.append(f"pp{lay.pp}" + (f"×{lay.virtual_stages}" if lay.virtual_stages > 1 else ""))
        said += [lay.schedule] * (lay.schedule not in ("1f1b", "interleaved"))
    said += [f"{axis}{getattr(lay, axis)}" for axis in ("cp", "ep") if getattr(lay, axis) > 1]
    if choice.job.precision != "bf16":
        said.append(choice.job.precision)
    return " ".join(said)


def _winner(best: Choice) -> Any:
    rows = [
        (_MEMORY.get(name, name), format_bytes(n), format_share(n / best.device_bytes))
        for name, n in sorted(best.memory.items(), key=lambda item: -item[1]) if n
    ]  # fmt: skip
    beside = best.device_bytes - best.peak_bytes
    rows.append(("allocator, context, NCCL", format_bytes(beside), format_share(beside / best.device_bytes)))
    rows.append(("needed", format_bytes(best.device_bytes), ""))
    rows.append(
        ("left", format_bytes(best.headroom_bytes), f"of {format_bytes(best.device_bytes + best.headroom_bytes)}")
    )
    return table(f"Memory of the fullest rank: {shorthand(best)}", ("", "bytes", ""), rows)


def _span(interval: tuple[float, float]) -> str:
    return " to ".join(format_bytes(n) for n in interval)


def _times(best: Choice) -> Any:
    rows = [
        (_TIME.get(name, name), format_seconds(s), format_share(s / best.step_seconds))
        for name, s in sorted(best.time.items(), key=lambda item: -item[1]) if s > 1e-4 * best.step_seconds
    ]  # fmt: skip
    rows.append(("step", format_seconds(best.step_seconds), f"{format_count(best.batch_tokens)} tokens"))
    return table("Time of its step, on the slowest stage", ("", "", ""), rows)


def _runner_up(best: Choice, other: Choice) -> Iterator[Any]:
    slower = other.step_seconds / other.batch_tokens / (best.step_seconds / best.batch_tokens) - 1
    yield line(f"Why {shorthand(other)}, {other.job.micro_batch}×{other.job.micro_batches}, "
               f"recompute {other.recompute}, comes second", style="bold")  # fmt: skip
    if abs(slower) < 1e-6:
        yield note(
            "it takes as long, and holds more"
            if other.device_bytes > best.device_bytes
            else "it takes and holds as much"
        )
        return
    yield note(f"{abs(slower) * 100:.2g} % {'slower' if slower > 0 else 'faster'} per token; per step of the first's:")
    for name, seconds in why(best, other)[:4]:
        yield note(f"{_TIME.get(name, name)}: {'+' if seconds > 0 else '−'}{format_seconds(abs(seconds))}")
    if other.device_bytes != best.device_bytes:
        yield note(f"memory: {format_bytes(other.device_bytes)}, the first's {format_bytes(best.device_bytes)}")


def _run(best: Choice) -> Iterator[Any]:
    hours = 0.0 if best.seconds is None else best.cluster.count * best.seconds / 3600
    said = [f"{best.steps:,} steps", f"{best.days:.4g} days", f"{hours:,.0f} GPU-hours"]
    said += [] if best.usd is None else [format_usd(best.usd)]
    said += [] if best.kwh is None else [f"{best.kwh:,.0f} kWh"]
    yield line("The run: " + ", ".join(said), style="bold")


def _rejected(plan: Plan) -> Any:
    rows = [(reason, f"{n:,}", format_share(n / plan.searched)) for reason, n in plan.rejected.items()]
    return table("Rejected", ("", "", ""), rows)


def _explain(best: Choice) -> Iterator[Any]:
    yield line("Where the figures come from", style="bold")
    job = best.job
    yield note("step: step_time, memory: rank_memory, the functions that bursar validate scores on published runs")
    yield note(
        f"batch = dp · b · M = {job.layout.dp} · {job.micro_batch} · {job.micro_batches} = {job.samples} sequences "
        f"= {best.batch_tokens} tokens"
    )
    if best.steps is not None:
        yield note(
            f"days = steps · step / 86400 = {best.steps} · {best.step_seconds:.5g} s / 86400 = {best.days:.5g}; "
            "steps = tokens / batch, rounded up"
        )
    yield note(
        "MFU = model FLOPs / (step · dense peak · accelerators); causal attention counts the pairs it lets through"
    )
