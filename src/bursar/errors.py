"""Every error bursar raises on purpose, with the exit code the command line gives it.

    BursarError            2   anything below; catch this one
    ├── UnknownName        2   a name no table has; says which names are near
    ├── BadInput           2   a value that cannot be meant; says what is accepted
    ├── DataDependent      2   the model's forward looks at its data; says where, and the way out
    ├── TraceFailed        2   the model could not be traced for another reason
    ├── MissingExtra       3   an optional part of bursar is not installed; says how to get it
    ├── NotCalibrated      3   this machine was not measured, and only a measurement could tell
    └── NoAnswer           1   a fair question whose answer is no: does not fit, over budget, impossible
        └── StepFailed     1   a step that was being measured came to no end; has what was measured

An error says what was asked, what is known, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = [
    "BadInput",
    "BursarError",
    "DataDependent",
    "MissingExtra",
    "NoAnswer",
    "NotCalibrated",
    "StepFailed",
    "TraceFailed",
    "UnknownName",
]


def printable(text: str, keep: str = "\n") -> str:
    """``text`` with control characters written out, but for those to ``keep``: a name in it may be anyone's, and a
    terminal obeys escapes.

    >>> printable("\x1b[31mred")
    '\\\\x1b[31mred'
    """
    return "".join(c if c.isprintable() or c in keep else f"\\x{ord(c):02x}" for c in text)


class BursarError(Exception):
    """The root of the tree.  ``exit_code`` is what a shell returns when it meets the error."""

    exit_code = 2


class UnknownName(BursarError):
    """A name that no row of a table carries.

    >>> print(UnknownName("accelerator", "h100", ["h100-sxm", "h100-pcie", "l4"], hint="Add a row."))
    no accelerator 'h100'; did you mean h100-sxm, h100-pcie? Add a row.
    >>> print(UnknownName("accelerator", "abacus", ["h100-sxm", "l4"]))
    no accelerator 'abacus'; known: h100-sxm, l4.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.name, self.known, self.hint = kind, name, tuple(known), hint
        self.near = _near(name, self.known)
        if self.near:
            guess = f"did you mean {', '.join(self.near)}?"
        elif self.known:
            guess = f"known: {', '.join(self.known)}."
        else:
            guess = "none is known."
        super().__init__(" ".join(filter(None, (f"no {kind} {name!r}; {guess}", hint))))


def _near(name: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The first known names that begin with ``name``, in table order; where none does, those spelt like it."""
    asked = name.strip().casefold()
    if not asked:
        return ()
    if begins := tuple(k for k in known if k.casefold().startswith(asked)):
        return begins[:3]
    folded = {k.casefold(): k for k in known}
    return tuple(folded[k] for k in difflib.get_close_matches(asked, folded, n=4, cutoff=0.6))


class BadInput(BursarError):
    """A value that cannot be meant.  The message says what was asked and what is accepted."""


class DataDependent(BursarError):
    """The model's forward needs the data itself, which a trace does not have.

    ``module`` is the path inside the model, ``where`` the user's own ``file:line``, ``remedy`` the next step.
    """

    def __init__(self, module: str, where: str, remedy: str) -> None:
        self.module, self.where, self.remedy = module, where, remedy
        super().__init__(f"the forward of {module or 'the model'} looks at its data at {where}; {remedy}")


class TraceFailed(BursarError):
    """The model could not be traced.  The message names the op or module and the one-line remedy."""


class MissingExtra(BursarError):
    """Something that comes with an optional extra is not installed.

    >>> print(MissingExtra("torch", "tracing a step runs the model's own code"))
    tracing a step runs the model's own code, and that needs the extra 'torch': pip install 'bursar[torch]'
    """

    exit_code = 3

    def __init__(self, extra: str, why: str) -> None:
        self.extra, self.why = extra, why
        super().__init__(f"{why}, and that needs the extra {extra!r}: pip install 'bursar[{extra}]'")


class NotCalibrated(BursarError):
    """This machine was asked for by ``local`` and nobody has measured it.  The message says what to use instead."""

    exit_code = 3


class NoAnswer(BursarError):
    """The request is well formed and the answer is no.  The message says by how much."""

    exit_code = 1


class StepFailed(NoAnswer):
    """A step raised, ran out of memory, lost its loss or was stopped while it was measured.

    ``unfinished`` (`bursar.unfinished.Unfinished`) has the figures measured until then, ``ledger`` is the forecast.
    """

    def __init__(self, message: str, unfinished: Any, ledger: Any) -> None:
        self.unfinished, self.ledger = unfinished, ledger
        super().__init__(message)
