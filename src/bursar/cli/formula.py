"""``bursar formula``: what a step costs, as formulas."""

from __future__ import annotations

from bursar.cli import common


def formula(
    model: str,
    /,
    *,
    batch_size: int | None = None,
    seq_len: int | None = None,
    precision: str = "fp32",
    optimizer: str | None = None,
    recompute: str = "none",
    symbols: str | None = None,
    on: str | None = None,
    json: common.Json = False,
    explain: common.Explain = False,
) -> None:
    """FLOPs, parameters and peak bytes of a step as formulas in B and S, exact; with --on the largest that fits.

    The step is traced at a few small sizes; polynomials through them are checked at sizes not used for them.

    Parameters
    ----------
    model:
        a preset, a Hugging Face config.json or its folder, file.py:callable or package.module:callable
    batch_size:
        around which batch B the peak is asked for (8, or the model's own)
    seq_len:
        around which sequence S (1024, or the model's longest)
    precision:
        fp32, tf32, bf16, bf16-mixed or fp16-mixed
    optimizer:
        a name of bursar optimizers (adamw; adagrad for cruncher)
    recompute:
        none, selective or full
    symbols:
        integer arguments of a callable to have formulas in, commas between (all with a default, if they are few)
    on:
        an accelerator: the largest batch and the longest sequence that fit it
    """
    common.need_torch("formulas are derived from traces of the model's own code")
    with common.progress(f"tracing {model}"):
        from bursar.workload.formula import formula as derive

        found = derive(
            model,
            batch_size=batch_size,
            seq_len=seq_len,
            precision=precision,
            optimizer=optimizer,
            recompute=recompute,
            on=on,
            symbols=None if symbols is None else [s.strip() for s in symbols.split(",") if s.strip()],
        )
    from bursar.report import formula as page

    if json:
        common.print_json(page.formula_record(found))
        return
    common.print_page(*page.render(found, explain=explain))
