"""``bursar optimizers``: the catalogue of optimizers, and the optimizers side by side."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from bursar.cli import common
from bursar.errors import BadInput, MissingExtra
from bursar.optimizers import OPTIMIZERS, optimizer

if TYPE_CHECKING:
    from bursar.optimizers import Cost


def optimizers(
    name: str | None = None,
    /,
    *,
    compare: str | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    bytes: Annotated[bool, Parameter(negative=())] = False,
    plot: Path | None = None,
    json: common.Json = False,
) -> None:
    """The optimizers bursar knows: rule, source, state, FLOPs and bytes per parameter, and what builds on what.

    Parameters
    ----------
    name:
        one of them, with its state tensors
    compare:
        a model: memory of its step under each optimizer, and a short measured race on one small task
    batch_size:
        with --compare: samples per step
    seq_len:
        with --compare: tokens per sample
    bytes:
        AdamW's training state in bytes per parameter under each precision
    plot:
        with --compare: draw the race into this file, .png or .svg
    """
    from bursar.report import optimizers as page

    if plot is not None and compare is None:
        raise BadInput("--plot draws the race of --compare MODEL")
    if compare is not None:
        _compare(compare, batch_size, seq_len, plot, json)
        return
    if bytes:
        common.need_torch("the bytes are counted on real tensors")
        from bursar.workload.optimizers import byte_table

        rows = byte_table()
        if json:
            common.print_json({"schema_version": 1, "bytes_per_parameter": rows})
        else:
            common.print_page(*page.bytes_page(rows))
        return
    found = [optimizer(n) for n in (OPTIMIZERS if name is None else (name,))]
    with common.progress("measuring"):
        costs = {row.name: _cost(row.name) for row in found}
    if json:
        common.print_json({"schema_version": 1, "optimizers": [page.record(r, costs[r.name]) for r in found]})
    elif name is None:
        common.print_page(*page.list_page(costs))
    else:
        common.print_page(*page.one_page(found[0], costs[name]))


def _cost(name: str) -> Cost | None:
    """What it costs; None where torch or its library is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    from bursar.workload.optimizers import cost

    try:
        return cost(name)
    except MissingExtra:
        return None


def _compare(model: str, batch_size: int | None, seq_len: int | None, plot: Path | None, json: bool) -> None:
    from bursar.report import optimizers as page

    common.need_torch("the optimizers are compared by running them")
    from bursar.workload import optimizers as work

    with common.progress(f"tracing {model} and running the race"):
        found, races = work.compare(model, batch_size, seq_len), work.race()
    if plot is not None:
        page.plot(races, work.RACE_TASK, plot)
    if json:
        common.print_json({"schema_version": 1, "model": model, **page.compare_record(found, races)})
        return
    common.print_page(*page.compare_page(model, found, races, work.RACE_TASK))
