"""``bursar diff``: what changed between two workloads, or in one between two git revisions."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from bursar.cli import common


def diff(
    a: str,
    b: str | None = None,
    /,
    *,
    base: str | None = None,
    head: str | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    precision: str = "fp32",
    optimizer: str | None = None,
    recompute: str = "none",
    accumulate: int = 1,
    zero_grad: str = "none",
    on: str | None = None,
    max_increase: str | None = None,
    json: common.Json = False,
    markdown: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """What changed between two workloads: FLOPs, bytes, peak and time bound, by module, and the lines that did it.

    Deterministic: the same two give the same output to the last byte, so that CI can gate on it.

    Parameters
    ----------
    a:
        the one before: a model as in bursar step, or what bursar step --json wrote
    b:
        the one after; with --base it may be left out, and is a at another revision
    base:
        a git revision: the code of a is taken from there
    head:
        a git revision: the code of b is taken from there (the working tree as it stands)
    batch_size:
        micro-batch in samples, of both
    seq_len:
        tokens per sample, of both
    precision:
        fp32, tf32, bf16, bf16-mixed or fp16-mixed
    optimizer:
        a name of bursar optimizers
    recompute:
        none, selective or full
    accumulate:
        micro-batches per optimizer step
    zero_grad:
        none or zeros
    on:
        the device of the time bound (h100-sxm; 8xh100-sxm for data-parallel ranks; cpu for the CPU backend's ops)
    max_increase:
        exit with 1 where FLOPs, bytes moved, peak or time bound rise by more: 2%, or flops=2%,peak=0%
    markdown:
        print Markdown, for a job's summary
    """
    from bursar.errors import BadInput, NoAnswer
    from bursar.gate import limits, rose

    allowed = {} if max_increase is None else limits(max_increase)
    if json and markdown:
        raise BadInput("--json and --markdown are two ways to print one answer; give one")
    with common.progress(f"tracing {a}" + (f" and {b}" if b else "")):
        from bursar.workload.sides import diff as compare

        options = {
            "batch_size": batch_size,
            "seq_len": seq_len,
            "precision": precision,
            "optimizer": optimizer,
            "recompute": recompute,
            "accumulate": accumulate,
            "zero_grad": zero_grad,
        }
        found = compare(a, b, base=base, head=head, on=on, options=options)
    over = rose(found, allowed)
    from bursar.report import diff as page

    if json:
        common.print_json(page.diff_record(found, allowed, over))
    elif markdown:
        sys.stdout.write(page.markdown(found, over))
    else:
        common.print_page(*page.render(found))
    if over:
        raise NoAnswer("over --max-increase: " + "; ".join(over))
