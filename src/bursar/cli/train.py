"""``bursar train``: the reference trainer."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bursar.cli import common


def train(
    config: Path,
    /,
    *,
    out: Path | None = None,
    max_steps: int | None = None,
    resume: Annotated[bool, Parameter(negative=())] = False,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    json: common.Json = False,
) -> None:
    """Train a model as CONFIG.toml says: forecast first, then the run, then both side by side.

    On several processes: torchrun --nproc-per-node 2 -m bursar.train CONFIG.toml

    Parameters
    ----------
    config:
        a TOML file: model, steps, batch_size, data, ... (examples/ has two; train/config.py lists the keys)
    out:
        the run's folder (runs/NAME of the config, with a number where that is taken): checkpoints, log.csv, tokens
    max_steps:
        stop after this step; the schedule stays that of the config
    resume:
        go on in the folder, from its newest good checkpoint, to the last bit as if never stopped (on a CPU)
    dry_run:
        print the forecast and stop
    """
    common.need_torch("training runs the model")
    if max_steps is not None and max_steps < 1:
        from bursar.errors import BadInput

        raise BadInput(f"--max-steps {max_steps} trains nothing; give 1 or more")
    from bursar import ranks
    from bursar.train import config as configs
    from bursar.train import loop

    def say(text: str) -> None:
        if ranks.mine == 0:
            common.warn([text])

    def progress(text: str) -> None:  # rewritten on a terminal, a line each in a pipe
        if ranks.mine == 0:
            live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
            print(f"\r\x1b[K{text}" if live else text, end="" if live else "\n", file=sys.stderr, flush=True)

    record = loop.train(
        configs.read(config), config.stem, out, max_steps, resume=resume, dry_run=dry_run, say=say, progress=progress
    )
    if ranks.mine:
        return
    if sys.stderr.isatty():
        print(file=sys.stderr)  # leave the progress line
    if json:
        common.print_json(record)
        return
    from bursar.report import train as page

    common.print_page(*page.render(record))
