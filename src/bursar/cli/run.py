"""``bursar run``: a whole run, solved for the part that is missing."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from bursar.cli import common
from bursar.errors import BadInput
from bursar.run import solve


def run(
    model: str | None = None,
    /,
    *,
    params: str | None = None,
    flops: str | None = None,
    tokens: str | None = None,
    batch: Annotated[str | None, Parameter(name=["--batch", "--batch-size"])] = None,
    seq_len: str | None = None,
    steps: str | None = None,
    on: str | None = None,
    gpus: str | None = None,
    dtype: str = "bf16",
    mfu: float | None = None,
    days: float | None = None,
    budget: str | None = None,
    usd_per_gpu_hour: float | None = None,
    batch_tokens: str | None = None,
    pue: float | None = None,
    goodput: Annotated[bool, Parameter(negative=())] = False,
    failures_per_gpu_hour: float | None = None,
    checkpoint_seconds: float | None = None,
    interval_seconds: float | None = None,
    restart_seconds: float | None = None,
    optimal: Annotated[bool, Parameter(negative=())] = False,
    json: common.Json = False,
    explain: common.Explain = False,
) -> None:
    """A whole run by time = FLOPs / (GPUs · peak · MFU), solved for whichever part is missing.

    Examples: bursar run --params 70B --tokens 15T --on 1024xh100-sxm --mfu 0.5 · bursar run llama3-8b --on 64xh100-sxm
    --days 30 (how many tokens?) · bursar run --flops gpt3 --on h100-sxm --days 30 (how many GPUs?)

    Parameters
    ----------
    model:
        a preset, a Hugging Face config.json, file.py:callable or package.module:callable: for its parameters
    params:
        parameters that one token passes through: 70B
    flops:
        the whole run's FLOPs, or one of gpt3, gpt4-rumour, us-1e26, eu-1e25
    tokens:
        training tokens: 15T
    batch:
        sequences per step, with --seq-len and --steps in place of --tokens
    seq_len:
        tokens per sequence
    steps:
        optimizer steps
    on:
        an accelerator (h100-sxm) or a cluster (1024xh100-sxm)
    gpus:
        how many of them
    dtype:
        the dtype whose dense peak counts
    mfu:
        model FLOPs utilisation, 0 to 1 (0.5 is assumed where time or GPUs are asked for)
    days:
        time, in days
    budget:
        US dollars
    usd_per_gpu_hour:
        price
    batch_tokens:
        tokens of one optimizer step: how many steps the run has (16M)
    pue:
        what the building uses over what its machines do (1.0)
    goodput:
        with failures: what of the time is kept work, and how often to write a checkpoint
    failures_per_gpu_hour:
        with --goodput: interruptions (2e-5, Llama 3's on 16 384 H100)
    checkpoint_seconds:
        with --goodput: to write one checkpoint (14 bytes per parameter at Llama 3's storage)
    interval_seconds:
        with --goodput: between two checkpoints (Daly's best)
    restart_seconds:
        with --goodput: from a failure to the next step (600)
    optimal:
        the model and tokens that Chinchilla's law would spend these FLOPs on
    """
    failing = {
        "failures_per_gpu_hour": failures_per_gpu_hour, "checkpoint_seconds": checkpoint_seconds,
        "interval_seconds": interval_seconds, "restart_seconds": restart_seconds,
    }  # fmt: skip
    if not goodput and any(value is not None for value in failing.values()):
        raise BadInput(f"{', '.join(k for k, v in failing.items() if v is not None)} go with --goodput; add it")
    if model is not None:
        if params is not None or flops is not None:
            raise BadInput("the model says the parameters; drop --params and --flops, or drop the model")
        params = str(_parameters(model))
    answer = solve(
        flops=flops,
        parameters=params,
        tokens=tokens,
        batch=batch,
        seq_len=seq_len,
        steps=steps,
        on=on,
        gpus=gpus,
        dtype=dtype,
        mfu=mfu,
        days=days,
        budget_usd=None if budget is None else _dollars(budget),
        usd_per_gpu_hour=usd_per_gpu_hour,
        batch_tokens=batch_tokens,
        pue=pue,
    )
    from bursar.goodput import goodput as kept
    from bursar.scaling import optimal as best

    left = kept(answer.seconds, answer.gpus, answer.parameters, **failing) if goodput else None
    split = best(answer.flops) if optimal else None
    common.warn(answer.warnings)
    if json:
        more = (
            {} if left is None else {"goodput": left.record(), "assumptions": [*answer.assumptions, *left.assumptions]}
        )
        more |= {} if split is None else {"optimal": split.record()}
        common.print_json({"schema_version": 1, **answer.record(), **more})
        return
    from bursar.report.run import render

    common.print_page(*render(answer, left, split, explain=explain))


def _parameters(model: str) -> int:
    """Parameters of a preset by its shape; of anything else by making it, without memory, as `step` would."""
    from bursar import architecture

    if model.split(":")[0] in architecture.known_models():
        return architecture.preset(model).parameters()
    common.need_torch(f"the parameters of {model} are counted on the model itself")
    from bursar.workload.resolve import parameters, resolve

    return parameters(resolve(model))


def _dollars(text: str) -> float:
    from bursar.units import parse_count

    return float(parse_count(text.removeprefix("$")))
