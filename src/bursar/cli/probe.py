"""``bursar probe``: is the initialisation healthy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bursar.cli import common
from bursar.errors import BadInput


def probe(
    model: str | None = None,
    /,
    *,
    init: str | None = None,
    depth: str | None = None,
    schemes: Annotated[bool, Parameter(negative=())] = False,
    batch_size: int | None = None,
    seq_len: int | None = None,
    lr: float = 1e-3,
    seed: int = 0,
    plot: Path | None = None,
    json: common.Json = False,
    explain: common.Explain = False,
) -> None:
    """Signal and gradient through every layer at initialisation, against theory. Exit code 1 if not healthy.

    The model is run once on real numbers on the CPU, forward and backward.

    Parameters
    ----------
    model:
        a preset, a Hugging Face config.json or its folder, file.py:callable or package.module:callable
    init:
        re-initialise every weight by this rule and compare; --schemes lists them
    depth:
        a depth or a range, 1..64, for models with L: what comes out and the gradient that comes back, by depth
    schemes:
        the initialisers, their variance by formula and as measured here
    batch_size:
        samples (a small batch of the model's own kind)
    seq_len:
        tokens per sample (128 for a language model)
    lr:
        learning rate of the plain gradient step in update/weight
    seed:
        of the weights and of the batch
    plot:
        draw the result to this .png or .svg
    """
    common.need_torch("a probe runs the model")
    from bursar.report import probe as page

    if plot is not None:
        page.check_plot(plot)
    if schemes:
        if model is not None or init is not None or depth is not None or plot is not None:
            raise BadInput("--schemes stands alone: it checks the initialisers, not a model")
        _schemes(seed, json)
        return
    if model is None:
        raise BadInput("probe what? Name a model, as in bursar probe gpt2:L=2, or give --schemes")
    from bursar.probe import sweep

    if depth is not None:
        depths, asked = sweep.parse_depths(depth), model
        if (model := sweep.narrowed(model)) != asked:
            common.warn([f"the sweep takes {model}: width changes no second moment; give H to choose it"])
        with common.progress(f"probing {model} at {len(depths)} depths"):
            found, points = sweep.over_depth(model, depths, init, batch_size, seq_len, lr, seed)
        verdict = page.worst(points)
        if json:
            common.print_json(page.probe_record(found, depths=points, verdict=verdict))
        else:
            common.print_page(*page.render_depths(model, points, init))
        if plot is not None:
            page.save_plot(plot, found, depths=points)
    else:
        with common.progress(f"probing {model}"):
            *before, found = sweep.probe_named(model, init, batch_size, seq_len, lr, seed)
        old, verdict = (before[0] if before else None), found.verdict
        if json:
            common.print_json(page.probe_record(found, before=old))
        else:
            common.print_page(*page.render(found, before=old, explain=explain))
        if plot is not None:
            page.save_plot(plot, found, before=old)
    if verdict != "healthy":
        sys.exit(1)


def _schemes(seed: int, json: bool) -> None:
    from bursar.probe.check import checks
    from bursar.probe.schemes import SCHEMES
    from bursar.report import probe as page

    lines, found = [s.line for s in SCHEMES.values()], checks(seed)
    if json:
        common.print_json(page.schemes_record(lines, found))
    else:
        common.print_page(*page.render_schemes(lines, found))
