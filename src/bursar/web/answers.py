"""From a set-up to what the page says of it, by calling the lower floors. No arithmetic here."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from bursar.architecture import Transformer, preset
from bursar.errors import BadInput, BursarError
from bursar.hardware import Cluster, accelerator
from bursar.jobs import decoder
from bursar.plan.search import RECOMPUTE, Choice, Plan, Question, search
from bursar.plan.usual import sequences, usual
from bursar.report import outlook
from bursar.report.outlook import Figure, Part
from bursar.web.state import EVERY, RECOMPUTES, Setup, State, query

TOP = 8  # layouts in the table
AXES = {"tp": "tp", "pp": "pp", "cp": "cp", "ep": "ep", "zero": "zero_stage", "group": "fsdp", "sp": "sequence_parallel",
        "virtual": "virtual_stages", "micro": "micro_batch"}  # fmt: skip
SECONDS = 90.0  # a search of every layout gets


@dataclass(frozen=True, slots=True)
class Row:
    """A layout of the table: the set-up that takes it, and its figures."""

    setup: Setup
    words: tuple[str, str]
    figures: dict[str, Figure]


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
    question, where = asked(setup), Cluster(accelerator(setup.gpu), setup.gpus)
    quick = usual(question, where, TOP)
    plan, shown = quick.plan, quick.shown
    if setup.search == EVERY:
        plan = search(question, [where], top=TOP)
        shown = plan.layouts[0] if plan.layouts else shown
    return _said(setup, question, plan, shown)


def asked(setup: Setup) -> Question:
    """``setup`` as a question to the search."""
    shape = preset(setup.model)
    if setup.layers is not None:
        if not isinstance(shape, Transformer):
            raise BadInput(f"{setup.model} has no depth to change")
        shape = preset(setup.model, L=setup.layers)
    given = {axis: getattr(setup, name) for name, axis in AXES.items() if getattr(setup, name) is not None}
    return Question(
        decoder(shape), setup.seq, sequences(setup.batch, setup.seq), float(setup.tokens), precisions=(setup.precision,),
        recompute=RECOMPUTE if setup.recompute is None else (RECOMPUTES[setup.recompute],),
        attention=setup.attention, optimizer=setup.optimizer, framework=setup.framework,
        compiled=setup.compiled == "yes", fixed=given, usd_per_gpu_hour=setup.price,
    )  # fmt: skip


def _said(setup: Setup, question: Question, plan: Plan, shown: Choice) -> Answered:
    fits, verdict = outlook.verdict(shown)
    return Answered(
        setup, f"{setup.model} on {shown.cluster.count:,} × {shown.cluster.accelerator.title}", fits, verdict,
        outlook.layout_words(shown), outlook.figures(shown, question), outlook.memory_parts(shown),
        shown.cluster.accelerator.usable_bytes, outlook.time_parts(shown),
        tuple(_row(setup, question, choice) for choice in plan.layouts),
        plan.searched, plan.feasible, dict(plan.rejected), outlook.assumptions(shown, question, plan),
    )  # fmt: skip


def _row(setup: Setup, question: Question, choice: Choice) -> Row:
    lay = choice.job.layout
    taken: dict[str, Any] = {name: int(getattr(lay, axis)) for name, axis in AXES.items() if axis != "micro_batch"}
    taken |= {"micro": int(choice.job.micro_batch), "recompute": choice.recompute}
    return Row(replace(setup, search="usual", **taken), outlook.layout_words(choice), outlook.brief(choice, question))


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
