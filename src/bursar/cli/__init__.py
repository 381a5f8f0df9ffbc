"""The command line: parse, call, print. No arithmetic here.

Each command is a module of this package and is imported when it is asked for, so ``bursar --help`` and ``bursar run``
answer without torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cyclopts
from cyclopts import App
from cyclopts.config import Env, Toml

from bursar import __version__
from bursar.errors import BursarError, printable

app = App(
    name="bursar",
    help="The accountant of deep-learning training: what a step and a whole run cost, before you have a GPU.",
    version=__version__,
    config=(Env("BURSAR_", show=False), Toml("bursar.toml", search_parents=True, allow_unknown=True)),
    help_format="plaintext",
    help_epilogue='Every flag may stand in bursar.toml ([step] precision = "bf16") or in the environment '
    "(BURSAR_STEP_PRECISION=bf16).",
)
COMMANDS = {
    "step": "One training step of a model: FLOPs, bytes, memory, and on a device seconds and MFU.",
    "run": "A whole run: FLOPs, GPUs, MFU, time, money; solves for the missing one.",
    "plan": "The best layouts of a run on a cluster: days, dollars, memory; why the rest is rejected.",
    "levers": "What each change does to memory and time on a device; the cheapest set that fits.",
    "formula": "FLOPs, parameters and peak bytes of a step as formulas in B and S; the largest that fits.",
    "diff": "What changed between two workloads or two git revisions of one, by module; a gate for CI.",
    "op": "One operation: FLOPs, bytes, what binds it, and with --measure its MFU here.",
    "validate": "Forecasts scored on tables of published runs.",
    "bench": "Measure this machine, once, so that --on local can forecast seconds on it.",
    "ui": "The web page, on this machine only: memory, time, MFU, days and dollars as you move sliders.",
    "lecture": "The claims of the lecture notes, executed: notes say, bursar computes, verdict.",
    "probe": "Signal and gradient through every layer at initialisation, against theory.",
    "train": "The reference trainer: forecast, run, and both side by side.",
    "optimizers": "The optimizers: rule, state, FLOPs per parameter; side by side on a model.",
    "hardware": "The catalogue of accelerators.",
    "models": "The catalogue of models.",
}
for _name, _help in COMMANDS.items():
    app.command(f"bursar.cli.{_name}:{_name}", name=_name, help=_help)


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 the answer is no, 2 the request is wrong, 3 something is missing."""
    try:
        app(argv, exit_on_error=False, print_error=True, result_action="return_value")
    except cyclopts.CycloptsError:
        sys.exit(2)
    except BursarError as error:
        print(f"bursar: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `bursar … | head`
        sys.stderr.close()
        sys.exit(0)
    except KeyboardInterrupt:
        print("bursar: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if "torch" not in sys.modules:
            raise
        print(printable(_own_traceback(error)), file=sys.stderr)
        sys.exit(2)


def _own_traceback(error: Exception) -> str:
    """The user's own traceback, without the frames of torch, Python and bursar. Our own bugs keep theirs whole."""
    import traceback

    ours = str(Path(__file__).resolve().parent.parent)
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [
        f for f in frames if "site-packages" not in f.filename and not f.filename.startswith((ours, sys.base_prefix))
    ]
    if not theirs and frames[-1].filename.startswith(ours):
        return "".join(traceback.format_exception(error))
    lines = ["Traceback (the model's own frames):\n", *traceback.format_list(theirs)] if theirs else []
    lines += traceback.format_exception_only(error)
    module = getattr(error, "bursar_module", "")
    if module:
        lines.append(f"in module {module}\n")
    return "".join(lines).rstrip()


__all__ = ["app", "main"]
