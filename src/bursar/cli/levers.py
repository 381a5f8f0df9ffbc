"""``bursar levers``: what each change does to memory and time, and the cheapest set that fits."""

from __future__ import annotations

from typing import Literal

from bursar.cli import common


def levers(
    model: str,
    /,
    *,
    on: str,
    batch_size: int = 8,
    seq_len: int | None = None,
    precision: Literal["bf16", "fp16", "fp32"] = "bf16",
    optimizer: str = "adamw",
    attention: Literal["naive", "flash"] = "naive",
    only: str = "",
    rank: int = 16,
    window: int = 1024,
    density: float = 0.01,
    json: common.Json = False,
    explain: common.Explain = False,
) -> None:
    """What each lever does to memory and time, alone and together: the cheapest set that fits, and how far it goes.

    Examples: bursar levers llama3-8b --on a100-80g-sxm · bursar levers llama3-8b --on 8xa100-80g-sxm --seq-len 8192
    Exit 1 where no set fits.

    Parameters
    ----------
    model:
        a preset (llama3-8b; sizes may be changed: gpt2:L=2,d=256) or a Hugging Face config.json or its folder
    on:
        a device (a100-80g-sxm) or a few (8xa100-80g-sxm)
    batch_size:
        samples of one device in one step
    seq_len:
        tokens per sample (1024, or the model's longest)
    precision:
        of the products; parameters, gradients and states are fp32 without levers
    optimizer:
        adamw, sgd, …
    attention:
        naive (scores are stored) or flash, without levers
    only:
        these levers and no others: checkpointing,zero-3
    rank:
        of LoRA's matrices
    window:
        of windowed attention, in tokens
    density:
        share of sparse gradients that is sent
    """
    from bursar.plan.levers import Settings
    from bursar.plan.levers import levers as measure
    from bursar.plan.request import device_of, model_of

    named = [name.strip() for name in only.split(",") if name.strip()]
    shape, tokens = model_of(model, seq_len, 1024)
    found = measure(
        shape, device_of(on), batch=batch_size, seq_len=tokens, precision=precision, optimizer=optimizer,
        attention=attention, settings=Settings(rank, window, density), only=named,
    )  # fmt: skip
    if json:
        common.print_json({"schema_version": 1, **found.record()})
    else:
        from bursar.report.levers import render

        common.print_page(*render(found, explain=explain))
    if found.cheapest is None:
        from bursar.errors import NoAnswer
        from bursar.units import format_bytes

        raise NoAnswer(
            f"no set of levers fits: the least is {format_bytes(found.together.outcome.device_bytes)} per device, and "
            f"{found.on.accelerator.name} has {format_bytes(found.usable_bytes)}; take more devices or a smaller model"
        )
