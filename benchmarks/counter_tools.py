"""How each counter is asked for a model's FLOPs: its own front door, its loudest warnings on, nothing of it replaced.

A tool's answer is a number in its own unit and what it said: what its API lists as unsupported, and what it printed.
Models are built anew for each answer, since some tools leave hooks and buffers in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from counter_cases import CPU_CASE, Built, Case

Answer = tuple[float | None, str]  # in the tool's unit, and what it names as left out


@dataclass(frozen=True)
class Tool:
    """A counter: what it sets out to count, and how it is asked."""

    name: str
    package: str
    unit: str  # as its documentation says; MACs are doubled before they are compared
    forward: Callable[[Case], Answer]
    step: Callable[[Case], Answer] | None = None
    estimates: bool = False  # its backward is a multiple of forward, and said to be
    other: bool = False  # counts work that is no product too
    optimizer: bool = False
    per_sample: bool = False  # its figure is of one sample
    how: str = ""


def on(device: str, case: Case) -> Built:
    with torch.device(device):
        return case.build()


# ---- bursar


def bursar_forward(case: Case) -> Answer:
    import bursar

    where = "cpu" if case.name == CPU_CASE else None
    device = where or "cuda"
    built = None if case.products else on("cpu", case)  # built inside, its initialisation would be in the total
    with bursar.tracing(on=where) as t, torch.no_grad():
        module, args = built or on(device, case)
        module.to(device)(*(a.to(device) for a in args))
    flops = t.ledger.flops
    return flops.forward if case.products else flops.total, names(t.ledger)


def bursar_step(case: Case) -> Answer:
    import bursar

    ledger = bursar.step(lambda: case.build(), optimizer="adamw")
    return ledger.flops.model if case.products else ledger.flops.optimizer, names(ledger)


def names(ledger: Any) -> str:
    return " ".join(u.op for u in ledger.uncounted)


# ---- torch


def torch_forward(case: Case, device: str) -> Answer:
    from torch.utils.flop_counter import FlopCounterMode

    module, args = on(device, case)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*args)
    return counter.get_total_flops(), ""


def torch_step(case: Case, device: str) -> Answer:
    from torch.utils.flop_counter import FlopCounterMode

    module, args = on(device, case)
    with FlopCounterMode(display=False) as counter:
        module(*args).mean().backward()
    return counter.get_total_flops(), ""


# ---- the others, on the CPU


def fvcore_forward(case: Case) -> Answer:
    from fvcore.nn import FlopCountAnalysis

    module, args = on("cpu", case)
    analysis = FlopCountAnalysis(module.eval(), args)
    return analysis.total(), " ".join(analysis.unsupported_ops())


def calflops_forward(case: Case, **how: Any) -> Answer:
    from calflops import calculate_flops

    module, args = on("cpu", case)
    flops, _, _ = calculate_flops(module, args=list(args), print_results=False, output_as_string=False, **how)
    return flops, ""


def calflops_step(case: Case) -> Answer:
    return calflops_forward(case, include_backPropagation=True)


def ptflops_forward(case: Case, backend: str) -> Answer:
    from ptflops import get_model_complexity_info

    module, (x,) = on("cpu", case)
    if backend == "pytorch":  # it asks for a size without a batch and runs one sample
        x = x[: len(x) // case.samples]
    macs, _ = get_model_complexity_info(module, (1,), as_strings=False, print_per_layer_stat=False, verbose=True,
                                        input_constructor=lambda _: x, backend=backend)  # fmt: skip
    return macs, ""


def thop_forward(case: Case) -> Answer:
    from thop import profile

    module, args = on("cpu", case)
    return profile(module, inputs=args, report_missing=True)[0], ""


def torchinfo_forward(case: Case) -> Answer:
    from torchinfo import summary

    module, args = on("cpu", case)
    return summary(module, input_data=list(args), verbose=0).total_mult_adds, ""


def torchlens_forward(case: Case) -> Answer:
    from torchlens.report import flops_report

    module, args = on("cpu", case)
    report = flops_report(module, list(args))
    return report.forward_flops, " ".join(map(str, report.unknown_op_names))


def torchlens_step(case: Case) -> Answer:
    import torchlens

    module, args = on("cpu", case)
    trace = torchlens.trace(module, list(args), save=None)
    try:
        return int(trace.total_flops), ""
    finally:
        trace.cleanup()


def deepspeed_forward(case: Case) -> Answer:
    from deepspeed.profiling.flops_profiler import get_model_profile

    module, args = on("cpu", case)
    flops, _, _ = get_model_profile(module, args=list(args), print_profile=False, as_string=False, warm_up=0)
    return flops, ""


TOOLS = (
    Tool("bursar", "bursar", "FLOPs", bursar_forward, bursar_step, other=True, optimizer=True,
         how="`bursar.tracing`, `bursar.step`; fake GPU"),
    Tool("torch, meta", "torch", "FLOPs", lambda c: torch_forward(c, "meta"), lambda c: torch_step(c, "meta"),
         how="`FlopCounterMode`, tensors on `meta`"),
    Tool("torch, CPU", "torch", "FLOPs", lambda c: torch_forward(c, "cpu"), lambda c: torch_step(c, "cpu"),
         how="`FlopCounterMode`, a real run on the CPU"),
    Tool("torchlens", "torchlens", "FLOPs", torchlens_forward, torchlens_step, estimates=True, other=True,
         how="`report.flops_report`; `trace().total_flops`"),
    Tool("calflops", "calflops", "FLOPs", calflops_forward, calflops_step, estimates=True, other=True,
         how="`calculate_flops`; backward is 2 × forward"),
    Tool("DeepSpeed", "deepspeed", "FLOPs", deepspeed_forward, other=True, how="`get_model_profile`"),
    Tool("fvcore", "fvcore", "MACs", fvcore_forward, how="`FlopCountAnalysis`; \"one multiply-add is one flop\""),
    Tool("ptflops", "ptflops", "MACs", lambda c: ptflops_forward(c, "pytorch"), per_sample=True,
         how="`get_model_complexity_info`, per sample, times the batch"),
    Tool("ptflops, aten", "ptflops", "MACs", lambda c: ptflops_forward(c, "aten"), how="the same, `backend=\"aten\"`"),
    Tool("thop", "thop", "MACs", thop_forward, how="`profile(report_missing=True)`"),
    Tool("torchinfo", "torchinfo", "MACs", torchinfo_forward, how="`summary().total_mult_adds`"),
)  # fmt: skip
