"""``bursar step``: what one training step costs."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from bursar.cli import common
from bursar.errors import BadInput, StepFailed

if TYPE_CHECKING:
    from bursar.ledger import Ledger
    from bursar.roofline import Forecast


def step(
    model: str,
    /,
    *,
    batch_size: int | None = None,
    seq_len: int | None = None,
    precision: str = "fp32",
    optimizer: str | None = None,
    recompute: str = "none",
    accumulate: int = 1,
    compile: Annotated[bool, Parameter(negative=())] = False,
    on: str | None = None,
    layout: str | None = None,
    zero_grad: str = "none",
    scratch: str = "asked",
    gradients: Annotated[bool, Parameter(negative=())] = False,
    measure: Annotated[bool, Parameter(negative=())] = False,
    benchmark: bool = True,
    json: common.Json = False,
    explain: common.Explain = False,
    html: Path | None = None,
    perfetto: Path | None = None,
    parquet: Path | None = None,
    csv: Path | None = None,
    markdown: Path | None = None,
    snapshot: Path | None = None,
    plot: Path | None = None,
) -> None:
    """One training step of a model: FLOPs, bytes, memory over time, and on a device seconds and MFU.

    The model's own code is run on tensors without data, so no GPU and no memory is needed.

    Parameters
    ----------
    model:
        a preset (bursar models lists them; sizes may be changed: gpt2:L=2,d=256), a Hugging Face config.json or its
        folder, file.py:callable or package.module:callable
    batch_size:
        micro-batch of one data-parallel rank, in samples (8; the notes' sizes for two-layer and cruncher)
    seq_len:
        tokens per sample (1024, or the model's longest)
    precision:
        fp32, tf32, bf16 (everything in bf16), bf16-mixed or fp16-mixed (autocast over fp32 parameters)
    optimizer:
        a name of bursar optimizers (adamw; adagrad for cruncher)
    recompute:
        none, selective (the attention core) or full (every repeated block)
    accumulate:
        micro-batches per optimizer step
    compile:
        price the fused, compiled step (not counted yet)
    on:
        an accelerator (h100-sxm), several as data-parallel ranks (8xh100-sxm), cpu for the CPU backend's ops, or local
        for this machine as bursar bench measured it
    layout:
        how the ranks share the work: dp=N (bursar plan prices the others)
    zero_grad:
        what becomes of gradients after the update: none (freed) or zeros (kept, filled with zeros)
    scratch:
        with --on cpu, what a kernel takes for itself: asked (each of oneDNN's is called once, on zeros), formula
        (nothing is called) or none
    gradients:
        per layer, the FLOPs of forward, dX and dW with shapes and formula
    measure:
        run the step on this machine too, and lay forecast and measurement side by side; 1 where they do not balance
    html:
        write a report to this file: pictures and tables on one page that needs no network
    perfetto:
        write a trace of the forecast for ui.perfetto.dev or chrome://tracing
    benchmark:
        with --on local, run each op that was not met before once by itself, and remember its seconds
    parquet:
        write the ledger, one row per op, to this file
    csv:
        the same as CSV
    markdown:
        write the main tables as Markdown
    snapshot:
        write the allocations as a memory snapshot, which pytorch.org/memory_viz shows
    plot:
        draw memory over the step: .svg, or .png with matplotlib
    """
    common.need_torch("a step is traced by running the model's own code")
    if compile:
        raise BadInput(
            "--compile is not counted yet: a compiled step moves fewer bytes; its FLOPs are those shown without"
        )
    files = _files(
        html=html, perfetto=perfetto, parquet=parquet, csv=csv, markdown=markdown, snapshot=snapshot, plot=plot
    )
    asked = _asked(model, batch_size=batch_size, seq_len=seq_len, precision=precision, optimizer=optimizer,
                   recompute=recompute, accumulate=accumulate, on=on, layout=layout, zero_grad=zero_grad,
                   scratch=scratch, gradients=gradients, measure=measure)  # fmt: skip
    on = _with_layout(on, layout)
    if measure:
        with _unfinished(json):
            _measured(
                model,
                {"batch_size": batch_size, "seq_len": seq_len},
                {"precision": precision, "optimizer": optimizer, "recompute": recompute, "accumulate": accumulate,
                 "zero_grad": zero_grad},
                on,
                json,
                files,
                asked,
                benchmark,
            )  # fmt: skip
        return
    if on == "local":
        _calibrated()
    with common.progress(f"tracing {model}"):
        from bursar.workload.step import step as trace

        ledger = trace(
            model,
            batch_size=batch_size,
            seq_len=seq_len,
            precision=precision,
            optimizer=optimizer,
            recompute=recompute,
            accumulate=accumulate,
            on=on,
            zero_grad=zero_grad,
            scratch=scratch,
        )
        forecast: Forecast | None
        if on == "local":
            from bursar import bench

            forecast = bench.priced(ledger, benchmark=benchmark, say=common.say).forecast
        else:
            forecast = ledger.on(on) if on not in (None, "cpu") and on is not None else None
    _write(files, ledger, forecast, command=asked, gradients=gradients)
    if json:
        from bursar.report.record import step_record

        common.print_json(step_record(ledger, forecast, on=on, gradients=gradients))
        return
    from bursar.report import step as page

    common.print_page(*page.render(ledger, forecast, on=on, gradients=gradients, explain=explain))


def _files(**paths: Path | None) -> dict[str, Path]:
    """What is to be written, by form. Raises BadInput where it could not be, before anything is traced."""
    from bursar.report import export

    files = {form: path for form, path in paths.items() if path is not None}
    for form, path in files.items():
        export.check(form, path)
    return files


def _asked(model: str, **flags: Any) -> str:
    """The command that asks for the same again; flags left at what they are without being given stand not in it."""
    unset = {"precision": "fp32", "recompute": "none", "accumulate": 1, "zero_grad": "none", "scratch": "asked"}
    given = {flag.replace("_", "-"): value for flag, value in flags.items()
             if value is not None and value is not False and value != unset.get(flag)}  # fmt: skip
    words = [f"--{flag}" + ("" if value is True else f" {shlex.quote(str(value))}") for flag, value in given.items()]
    return " ".join(["bursar step", shlex.quote(model), *words])


def _write(files: dict[str, Path], ledger: Ledger, forecast: Forecast | None, **more: Any) -> None:
    from bursar.report import export

    for form, path in files.items():
        export.write(form, ledger, forecast, path, **more)


def _measured(
    model: str,
    sizes: dict[str, Any],
    options: dict[str, Any],
    on: str | None,
    json: bool,
    files: dict[str, Path],
    asked: str,
    benchmark: bool,
) -> None:
    """Trace and run the step on this machine; both books. Raises NoAnswer where they do not balance."""
    from bursar.errors import NoAnswer

    if on not in (None, "cpu", "local"):
        raise BadInput(f"--measure runs the step on this machine, not on {on}; leave --on out, or give --on local")
    if on == "local":
        _calibrated()
    with common.progress(f"measuring {model}"):
        import torch

        from bursar.meter.guard import measure
        from bursar.reconcile import reconcile
        from bursar.workload.resolve import resolve
        from bursar.workload.step import step as trace

        device = torch.device("cuda" if torch.cuda.is_available() and on != "cpu" else "cpu")
        work = resolve(model, **sizes)
        options = {**options, "optimizer": options["optimizer"] or work.optimizer}
        ledger = trace(model, **sizes, **options, on="cpu" if device.type == "cpu" else None, fold=False)
        priced = None
        if on == "local":
            from bursar import bench

            priced = bench.priced(ledger, benchmark=benchmark, say=common.say)
        measured = measure(work, ledger, device, **options)
        found = reconcile(ledger, measured, priced.expected if priced is not None else None)
        if priced is not None:
            bench.learn(ledger.model.name, priced, measured)
    _write(
        files, ledger, priced.forecast if priced is not None else None, command=asked, measured=measured, found=found
    )
    from bursar.report import reconcile as page

    if json:
        common.print_json(page.record(ledger, measured, found))
    else:
        common.print_page(*page.render(ledger, measured, found))
    if not found.balances:
        raise NoAnswer("the books do not balance: " + ", ".join(x.what for x in found.lines if not x.balances))


def _calibrated() -> None:
    """Raise NotCalibrated, before anything is traced, where this machine was not measured as it is now."""
    import torch

    from bursar import machine, store

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    store.load(machine.current(torch.get_num_threads(), name))


@contextlib.contextmanager
def _unfinished(json: bool) -> Iterator[None]:
    """Print what was measured of a step that came to no end, before its error ends the command."""
    try:
        yield
    except StepFailed as failed:
        from bursar.report import unfinished as page

        if json:
            common.print_json(page.record(failed.ledger, failed.unfinished))
        else:
            common.print_page(*page.render(failed.ledger, failed.unfinished))
        raise


def _with_layout(on: str | None, layout: str | None) -> str | None:
    """``--on`` with the data-parallel ranks of ``--layout``. Raises BadInput for layouts that are not counted yet."""
    if layout is None:
        return on
    from bursar.hardware import cluster

    if on in (None, "cpu") or on is None:
        raise BadInput("a layout needs devices to lay out over: --on 8xh100-sxm --layout dp=8")
    parts = dict(part.partition("=")[::2] for part in layout.split(","))
    unknown = [name for name in parts if name != "dp"]
    if unknown:
        raise BadInput(f"layout {unknown[0]!r} is not counted yet; step knows dp=N, bursar plan --layout the others")
    given = cluster(on)
    if not parts["dp"].isdecimal() or int(parts["dp"]) != given.count:
        raise BadInput(
            f"layout dp={parts['dp']} does not use the {given.count} devices of --on {on}; give dp={given.count}"
        )
    return on
