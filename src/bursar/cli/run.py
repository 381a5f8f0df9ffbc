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
    """
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
    )
    common.warn(answer.warnings)
    if json:
        common.print_json({"schema_version": 1, **answer.record()})
        return
    from bursar.report.run import render

    common.print_page(*render(answer, explain=explain))


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
