"""From a set-up to what the page says of it, by calling the lower floors. No arithmetic here."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from bursar.architecture import preset_keys
from bursar.errors import BadInput, BursarError
from bursar.hardware import Cluster
from bursar.plan.request import question_of
from bursar.plan.search import Choice, Plan, Question, search
from bursar.plan.usual import usual
from bursar.report import outlook
from bursar.report.outlook import Change, Figure, Part
from bursar.web.state import EVERY, Setup, State, query

TOP = 8  # layouts in the table
AXES = {"tp": "tp", "pp": "pp", "cp": "cp", "ep": "ep", "zero": "zero_stage", "group": "fsdp",
        "sp": "sequence_parallel", "virtual": "virtual_stages", "micro": "micro_batch"}  # fmt: skip
DEPTH = ("L", "N")  # what presets call their number of layers
SECONDS = 90.0  # a search of every layout gets


@dataclass(frozen=True, slots=True)
class Row:
    """A layout of the table: the set-up that takes it, and its figures."""

    setup: Setup
    words: tuple[str, str]
    figures: dict[str, Figure]
    slower_by: str


@dataclass(frozen=True, slots=True)
class Answered:
    """All the page says of one set-up."""

    setup: Setup
    title: str
    fits: str  # yes, perhaps, no
    verdict: str
    layout: tuple[str, str]
    figures: dict[str, Figure]
    memory: tuple[Part, ...]
    usable_bytes: float
    time: tuple[Part, ...]
    rows: tuple[Row, ...]
    searched: int
    feasible: int
    rejected: dict[str, int]
    assumptions: tuple[str, ...]


def answer(setup: Setup) -> Answered:
    """Everything the page says of ``setup``. Raises BursarError for what cannot be."""
    return _apart(setup) if setup.search == EVERY else found(setup)


def found(setup: Setup) -> Answered:
    """The same, in this process."""
    question, where = asked(setup)
    quick = usual(question, where, TOP)
    plan, shown = quick.plan, quick.shown
    if setup.search == EVERY:
        plan = search(question, [where], top=TOP)
        shown = plan.layouts[0] if plan.layouts else shown
    return _said(setup, question, plan, shown)


def asked(setup: Setup) -> tuple[Question, Cluster]:
    """``setup`` as a question to the search, and where. Raises BursarError for what cannot be meant."""
    model = setup.model
    if setup.layers is not None:
        depth = next(key for key in DEPTH if key in preset_keys(model))
        model = f"{model}:{depth}={setup.layers}"
    given = ((axis, getattr(setup, name)) for name, axis in AXES.items())
    question, clusters = question_of(
        model, on=f"{setup.gpus}x{setup.gpu}", tokens=str(setup.tokens), batch_tokens=str(setup.batch),
        seq_len=str(setup.seq), usd_per_gpu_hour=setup.price,
        layout=",".join(f"{axis}={value}" for axis, value in given if value is not None),
        precision=setup.precision, recompute=setup.recompute or "any", attention=setup.attention,
        optimizer=setup.optimizer, framework=setup.framework, compiled=setup.compiled == "yes",
    )  # fmt: skip
    return question, clusters[0]


def changes(setup: Setup) -> tuple[Change, ...]:
    """What each lever alone would make of the layout that is shown for ``setup``."""
    question, where = asked(setup)
    return outlook.changes(usual(question, where, 1).shown)


def _said(setup: Setup, question: Question, plan: Plan, shown: Choice) -> Answered:
    fits, verdict = outlook.verdict(shown)
    return Answered(
        setup, f"{setup.model} on {shown.cluster.count:,} × {shown.cluster.accelerator.title}", fits, verdict,
        outlook.layout_words(shown), outlook.figures(shown, question), outlook.memory_parts(shown),
        shown.cluster.accelerator.usable_bytes, outlook.time_parts(shown),
        tuple(_row(setup, choice, plan.layouts[0]) for choice in plan.layouts),
        plan.searched, plan.feasible, dict(plan.rejected), outlook.assumptions(shown, question, plan),
    )  # fmt: skip


def _row(setup: Setup, choice: Choice, best: Choice) -> Row:
    lay = choice.job.layout
    taken: dict[str, Any] = {name: int(getattr(lay, axis)) for name, axis in AXES.items() if axis != "micro_batch"}
    taken |= {"micro": int(choice.job.micro_batch), "recompute": choice.recompute}
    mine = replace(setup, search="usual", **taken)
    return Row(mine, outlook.layout_words(choice), outlook.brief(choice), outlook.against(best, choice))


def _apart(setup: Setup) -> Answered:
    """The answer, worked out by a process of its own: a long search leaves this one light, and can be ended."""
    command = [sys.executable, "-m", "bursar.web.apart", query(State(setup))]
    try:
        done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise BadInput(
            f"no answer within {SECONDS:g} s: set some of the layout's fields, or take the usual layouts"
        ) from None
    if done.returncode:
        raise BursarError(done.stderr.decode(errors="replace").strip() or "the search ended without an answer")
    return msgspec.json.decode(done.stdout, type=Answered)


def record(answered: Answered) -> dict[str, Any]:
    """The JSON of one set-up's answer."""
    return {
        "address": "/?" + query(State(answered.setup)),
        "fits": answered.fits,
        "verdict": answered.verdict,
        "layout": answered.layout,
        "figures": outlook.records(tuple(answered.figures.values())),
        "memory": {p.name: p.value for p in answered.memory},
        "usable_bytes": answered.usable_bytes,
        "time": {p.name: p.value for p in answered.time},
        "layouts": [
            {
                "address": "/?" + query(State(r.setup)),
                "layout": r.words,
                "figures": {k: f.value for k, f in r.figures.items()},
            }
            for r in answered.rows
        ],
        "searched": answered.searched,
        "feasible": answered.feasible,
        "rejected": answered.rejected,
        "assumptions": answered.assumptions,
    }
