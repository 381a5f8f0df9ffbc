"""``bursar plan``: the best layouts of a training run on a cluster."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

from bursar.cli import common


def plan(
    model: str,
    /,
    *,
    on: str,
    gpus: str | None = None,
    tokens: str | None = None,
    batch_tokens: str | None = None,
    batch: Annotated[str | None, Parameter(name=["--batch", "--batch-size"])] = None,
    seq_len: str | None = None,
    by: Literal["time", "cost", "memory"] = "time",
    top: int = 10,
    days: float | None = None,
    budget: str | None = None,
    usd_per_gpu_hour: float | None = None,
    layout: str | None = None,
    precision: str = "bf16",
    recompute: str = "any",
    schedule: str = "1f1b,interleaved",
    attention: Literal["flash", "fused", "naive"] = "flash",
    optimizer: str = "adamw",
    framework: str = "megatron-bridge",
    compile: Annotated[bool, Parameter(negative=())] = False,
    node: int | None = None,
    network: str | None = None,
    every: Annotated[bool, Parameter(negative=())] = False,
    fits: Annotated[bool, Parameter(negative=())] = False,
    json: common.Json = False,
    explain: common.Explain = False,
) -> None:
    """Every way to lay a model's training out on a cluster, priced and ranked; why the rest is rejected.

    Examples: bursar plan llama3-70b --on 1024xh100-sxm --tokens 15T --batch-tokens 16M --seq-len 8192 · bursar plan
    llama3-8b --on h100-sxm,b200 --gpus 64..512 --tokens 15T --days 30 (the fewest that finish) · --by cost --budget 1M
    (the cheapest) · bursar plan llama3-70b --on 8xh100-sxm --fits (exit 1 where nothing fits)

    Parameters
    ----------
    model:
        a preset (llama3-70b; sizes may be changed: gpt2:L=2,d=256) or a Hugging Face config.json or its folder
    on:
        a cluster (1024xh100-sxm), or with --gpus accelerators that compete (h100-sxm,b200)
    gpus:
        how many (512), or a range (64..2048): whole nodes, powers of two and 3/2 of them
    tokens:
        of the run (15T); without, there are no days and no cost
    batch_tokens:
        tokens of one optimizer step (16M); rounded per layout to the nearest that divides (4M where not given)
    batch:
        the same in sequences
    seq_len:
        tokens per sequence (the model's longest)
    by:
        rank by time per token, cost of the run, or memory left
    top:
        layouts to show
    days:
        the most a run may take; over a range of --gpus the fewest then come first
    budget:
        the most it may cost, in US dollars
    usd_per_gpu_hour:
        price, in place of the catalogue's
    layout:
        axes to fix: tp=8,pp=4 (dp tp pp cp ep fsdp zero_stage sequence_parallel virtual_stages)
    precision:
        of the products: bf16, fp8, …; several compete (bf16,fp8)
    recompute:
        any, or some of none, selective, full, every_k:2
    schedule:
        pipeline schedules that compete: gpipe, 1f1b, interleaved, zero-bubble, dualpipev
    attention:
        flash, fused, or naive (scores are stored)
    optimizer:
        adamw, adamw-8bit, …
    framework:
        whose habits hold: megatron-bridge, torchtitan, fsdp, …
    compile:
        fused kernels as torch.compile makes them
    node:
        accelerators of one node, where it is not the catalogue's
    network:
        of one node, one direction: 400GB/s
    every:
        show every layout, not the best of each division of the ranks alone
    fits:
        only whether anything fits: exit 1 where nothing does
    """
    from bursar.plan.request import question_of

    question, clusters = question_of(
        model, on=on, gpus=gpus, tokens=tokens, batch_tokens=batch_tokens, batch=batch, seq_len=seq_len, days=days,
        budget=budget, usd_per_gpu_hour=usd_per_gpu_hour, layout=layout, precision=precision, recompute=recompute,
        schedule=schedule, attention=attention, optimizer=optimizer, framework=framework, compiled=compile, node=node,
        network=network, top=top,
    )  # fmt: skip
    from bursar.plan.search import require, search

    with common.progress(f"laying out {model}"):
        found = search(question, clusters, by, top, distinct=not every)
    if json:
        common.print_json({"schema_version": 1, **found.record()})
    elif fits:
        common.print_page(found.verdict)
    else:
        from bursar.report.plan import render

        common.print_page(*render(found, explain=explain))
    require(found)
