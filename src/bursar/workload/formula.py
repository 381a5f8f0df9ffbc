"""What a step costs as formulas in B and S: exact polynomials through a few traces, checked at sizes not used for them.

    B batch   S sequence   N parameters   P parameters in matrices   L layers   d model   V vocabulary   T positions

FLOPs are interpolated as they stand. Memory is interpolated storage by storage (`livebytes`).

All of it is in fractions: a formula that passes its checks is exact, and what fails them is refused.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from bursar import architecture
from bursar.architecture import Network, Transformer
from bursar.errors import BadInput, BursarError
from bursar.hardware import cluster
from bursar.ledger import Ledger
from bursar.polynomial import Interpolation, Polynomial, Powers, basis
from bursar.report.formula import Fits, Formula, Law
from bursar.report.reading import decoder_matrices, read_flops, read_parameters, read_widths
from bursar.report.reading import symbols as symbols_of
from bursar.roofline import RESERVE_BYTES
from bursar.rules import mixture
from bursar.units import format_bytes
from bursar.workload.livebytes import MULTIPLES, Lines, live_bytes
from bursar.workload.resolve import _find, from_callable, resolve
from bursar.workload.step import step

FLOPS = ("forward", "backward", "model", "recompute", "hardware", "attention", "attention_full_square", "optimizer",
         "total")  # fmt: skip
DEGREES = {"B": (1, 2), "S": (2, 3)}  # tried first, and where a check fails
MOST_TRACES = 40  # spent on a callable's widths


@dataclass(frozen=True)
class _Seen:
    """One trace, as far as formulas need it."""

    flops: Mapping[str, int]
    parameters: int
    bytes: np.ndarray  # live when the step begins, then each allocation (+) and free (-), in order


class _Traces:
    """Traces of one workload at the sizes asked for, each made once."""

    def __init__(
        self, model: str | Callable[..., Any], has_sequence: bool, seq_len: int | None, how: dict[str, Any]
    ) -> None:
        self.model, self.has_sequence, self.seq_len, self.how = model, has_sequence, seq_len, how
        self._seen: dict[Any, _Seen] = {}

    def ledger(self, B: int | None, S: int | None, model: Any = None) -> Ledger:
        """A fresh trace."""
        return step(model or self.model, batch_size=B, seq_len=S if self.has_sequence else self.seq_len, **self.how)

    def at(self, *point: int, widths: tuple[tuple[str, int], ...] = ()) -> _Seen:
        """The trace at B (and S), of a callable with the widths given."""
        key = (point, widths)
        if key not in self._seen:
            model = partial(self.model, **dict(widths)) if widths and callable(self.model) else None
            ledger = self.ledger(point[0], point[1] if len(point) > 1 else None, model)
            if ledger.step.samples != point[0]:
                raise BadInput(
                    f"asked for a batch of {point[0]}, the model was given {ledger.step.samples}: there is no batch to "
                    "vary; let the callable take batch_size and make its batch of that many samples"
                )
            self._seen[key] = _see(ledger)
        return self._seen[key]

    def keep(self, point: Powers, ledger: Ledger) -> None:
        """A trace made elsewhere."""
        self._seen[point, ()] = _see(ledger)


def _see(ledger: Ledger) -> _Seen:
    flops, memory = ledger.flops, ledger.memory
    if flops.uncounted:
        names = ", ".join(u.op for u in flops.uncounted[:3])
        raise BadInput(
            f"a formula of a count that is short would be wrong: {names} has no rule; add one, see `bursar step`"
        )
    return _Seen(
        {name: getattr(flops, name) for name in FLOPS},
        ledger.model.parameters,
        np.array([sum(memory.base.values()), *memory.event_deltas.tolist()], dtype=np.int64),
    )


def formula(
    model: str | Callable[..., Any],
    *,
    batch_size: int | None = None,
    seq_len: int | None = None,
    precision: str = "fp32",
    optimizer: str | None = None,
    recompute: str = "none",
    on: str | None = None,
    symbols: Sequence[str] | None = None,
) -> Formula:
    """FLOPs, parameters and peak bytes of one training step of ``model`` as formulas in B samples of S tokens.

    ``model`` is a name as on the command line, or a callable as `bursar.step` takes it. ``batch_size`` and ``seq_len``
    say around which sizes the peak is asked for. ``symbols`` names integer arguments of a callable for
    formulas in them too (None: all that have a default, if that takes few traces). ``on`` names an accelerator: the
    record then says the largest B and S that fit it.

    Raises BadInput where no batch can be varied, where a figure is no polynomial, and where ops are uncounted; and what
    `bursar.step` raises.
    """
    if isinstance(model, nn.Module):
        raise BadInput("a module has one batch; give a callable that takes batch_size (and seq_len), or a model's name")
    device = None if on in (None, "cpu") else cluster(str(on))
    if device is not None and device.count > 1:
        raise BadInput(f"a formula is of one device; give --on {device.accelerator.name}")
    name, given = _named(model)
    how: dict[str, Any] = {"precision": precision, "optimizer": optimizer, "recompute": recompute,
                           "on": "cpu" if on == "cpu" else None}  # fmt: skip
    first = step(given, batch_size=batch_size, seq_len=seq_len, **how)
    B, S = first.step.samples, _sequence(model, given, first, seq_len)
    if not B:
        raise BadInput(f"{name}: no batch found whose size could be varied; its forward takes no tensor")
    traces = _Traces(given, S is not None, seq_len, how)
    letters: tuple[str, ...] = ("B",) if S is None else ("B", "S")
    at = (B,) if S is None else (B, S)
    traces.keep(at, first)

    points, checks, fits = _interpolate(traces, letters, at)
    flops = {figure: fits(partial(_figure, figure), figure) for figure in FLOPS}
    parameters = fits(lambda seen: seen.parameters, "the number of parameters")
    notes: list[str] = []
    if S is None and seq_len is not None:
        notes.append(f"a sequence of {seq_len} is too short to vary: formulas in B alone")
    shape = _shape(model)
    known = symbols_of(shape, *_weights(model, given, shape), first.model.parameters)
    laws = {figure: Law(p, read_flops(figure, p, known)) for figure, p in flops.items()}
    count = Law(parameters, read_parameters(parameters, shape, known))

    limit = None if shape is None else _limit(shape)
    lines, here, multiple = _memory(traces, letters, points, checks, at)
    peak = None
    if here is None:
        notes.append("peak bytes: no formula, for traces at other sizes allocate in another order")
    else:
        row = first.rows[first.memory.peak_row]
        where = f"in {row.phase}, at {row.op}" + (f" in {row.module}" if row.module else "")
        peak = replace(here.peak(at, known, where, limit), multiple=multiple)
        if here is not lines:
            peak = replace(peak, batch_sizes=(1, 1))
            notes.append("one sample allocates in an order of its own: its peak is a formula in S alone")
    widths, more = _in_widths(traces, letters, points, checks, flops, symbols)
    notes += more
    found_fit = None
    if device is not None and lines is not None and here is not None:
        usable = device.accelerator.usable_bytes - RESERVE_BYTES
        found_fit = _fit(traces, (lines, here)[: len(at)], at, device.accelerator.name, usable, limit, multiple)
        notes.append(
            f"fits compares with {device.accelerator.usable_bytes:,} usable bytes less {RESERVE_BYTES:,} for context "
            "and libraries"
        )  # fmt: skip
    used, tried = (", ".join("(" + ", ".join(map(str, p)) + ")" for p in some) for some in (points, checks))
    letters_text = ", ".join(letters)
    derivation = [
        f"traced at ({letters_text}) = {used}; polynomials of degree {_degrees(points)} through them, in fractions",
        "peak: each storage's bytes is a polynomial of its own, live bytes their running sum, the peak their maximum",
        f"checked, and exact, at sizes not used for them: ({letters_text}) = {tried}",
    ]
    return Formula(
        name, letters, dict(zip(letters, at, strict=True)), known, laws, count, peak, widths, found_fit,
        tuple(derivation), (*notes, *first.assumptions),
    )  # fmt: skip


# ---- what may be varied


def _named(model: str | Callable[..., Any]) -> tuple[str, str | Callable[..., Any]]:
    """The model's name, and it as `step` is to be given it: a callable of the user's is looked up once."""
    if not isinstance(model, str):
        return getattr(model, "__name__", type(model).__name__), model
    where, _, name = model.rpartition(":")
    is_preset = model.split(":")[0] in architecture.known_models()
    if where and not is_preset and (where.endswith(".py") or all(part.isidentifier() for part in where.split("."))):
        return model, _find(where, name)
    return model, model


def _arguments(model: str | Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    if isinstance(model, str):
        return {}
    try:
        return inspect.signature(model).parameters
    except (TypeError, ValueError):
        return {}


def _sequence(asked: Any, given: Any, first: Ledger, seq_len: int | None) -> int | None:
    """The sequence length of the first trace, None where there is none to vary."""
    per_sample = first.step.tokens // max(1, first.step.samples)
    arguments = _arguments(given)
    if not isinstance(given, str):
        if "seq_len" in arguments:
            default = arguments["seq_len"].default
            found = seq_len if seq_len is not None else default if isinstance(default, int) else per_sample
            return found if found > 3 else None
        if _makes_its_batch(given):
            return None
    return per_sample if per_sample > 3 else None


def _makes_its_batch(given: Callable[..., Any]) -> bool:
    with torch.device("meta"):
        return not isinstance(given(), nn.Module)


def _shape(model: Any) -> Transformer | None:
    if isinstance(model, str) and model.split(":")[0] in architecture.known_models():
        found = architecture.preset(model)
        return found if isinstance(found, Transformer) and found.family in ("gpt", "llama") else None
    return None


def _limit(shape: Transformer) -> int | None:
    """The longest sequence the model has positions for."""
    return shape.max_seq_len if shape.position == "learned" else None


# ---- polynomials through traces


def _figure(name: str, seen: _Seen) -> int:
    return seen.flops[name]


_Fit = Callable[[Callable[[_Seen], int], str], Polynomial]


def _interpolate(traces: _Traces, letters: tuple[str, ...], at: Powers) -> tuple[list[Powers], list[Powers], _Fit]:
    """The points traced, those kept for checking, and a function that fits a figure or raises BadInput."""
    unit = _unit(at[1]) if len(at) > 1 else 1
    for attempt in range(2):
        degrees = [DEGREES[letter][attempt] for letter in letters]
        axes = [_axis(at[0], degrees[0], 1)]
        if len(at) > 1:
            axes.append(_axis(at[1], degrees[1], unit))
        points = list(itertools.product(*axes))
        unseen = (7 if at[0] != 7 else 5, 3 * unit + 1 if 3 * unit < at[-1] else 3 * unit - 1)[: len(at)]
        checks = [p for p in (unseen, at) if p not in points]
        made = Interpolation(letters, points, basis(degrees), MULTIPLES if len(letters) > 1 else (1,))
        values = [traces.at(*p) for p in points]
        seen = [(p, traces.at(*p)) for p in checks]

        fit = partial(_fitted, made, values, seen)
        try:
            for figure in FLOPS:
                fit(partial(_figure, figure), figure)
        except BadInput:
            if attempt:
                raise
            continue
        return points, checks, fit
    raise AssertionError("the second attempt returns or raises")


def _fitted(
    made: Interpolation,
    values: Sequence[_Seen],
    seen: Sequence[tuple[Powers, _Seen]],
    ask: Callable[[_Seen], int],
    what: str,
) -> Polynomial:
    """The polynomial of one figure. Raises BadInput where there is none that holds at the checks."""
    found = made.fit([ask(v) for v in values], [(p, ask(v)) for p, v in seen])
    if found is None:
        degrees = ", ".join(map(str, made.powers[-1]))
        raise BadInput(
            f"{what} is no polynomial of degree {degrees} in {', '.join(made.letters)} through {len(values)} traces "
            f"that also holds at {seen[0][0]}; take bursar step at the sizes you need"
        )
    return found


def _axis(asked: int, degree: int, unit: int) -> list[int]:
    """Sizes to trace along one letter: multiples of ``unit``, and the one asked for unless it is 1, where torch may
    leave out a copy that any other size needs."""
    first = [unit * (i + 1) for i in range(1 if unit == 1 else 0, degree + 2)]
    return sorted({*[n for n in first if n != asked][:degree], asked if asked > 1 else first[degree]})


def _unit(S: int) -> int:
    """The step between the sequences traced, so that four of them are no longer than the one asked for."""
    return next((u for u in (128, 64, 32, 16, 8) if 4 * u <= S), max(1, S // 4))


def _degrees(points: Sequence[Powers]) -> str:
    return " and ".join(str(len(set(axis)) - 1) for axis in zip(*points, strict=True))


# ---- memory


def _memory(
    traces: _Traces, letters: tuple[str, ...], points: Sequence[Powers], checks: Sequence[Powers], at: Powers
) -> tuple[Lines | None, Lines | None, int]:
    """Live bytes for two samples and more, and around ``at``; and of which multiple S must be.

    With one sample torch may leave out copies, and a kernel may want a mask's rows padded unless 16 divides S.
    """

    def fit(points: Sequence[Powers], checks: Sequence[Powers]) -> Lines | None:
        return live_bytes(
            letters, points, [traces.at(*p).bytes for p in points], checks, [traces.at(*p).bytes for p in checks]
        )

    everywhere = fit(points, checks)
    if everywhere is not None:
        return everywhere, everywhere, 1
    if at[0] > 1:
        unit = min(p[-1] for p in points)
        half = unit // 2  # the sequences traced are multiples of the unit, and so of its half
        if not at[1:] or half < 16 or at[1] % half:
            return None, None, 1
        coarse = fit(points, [(7 if at[0] != 7 else 5, 5 * half)])
        return coarse, coarse, half
    several = fit(points, [p for p in checks if p[0] > 1])
    alone = fit(sorted({(1, *p[1:]) for p in points}), [(1, *p[1:]) for p in checks if p[0] > 1]) if at[1:] else None
    return several, alone, 1


# ---- what fits


def _fit(
    traces: _Traces,
    lines: Sequence[Lines],
    at: Powers,
    hardware: str,
    usable: int,
    limit: int | None,
    multiple: int,
) -> Fits:
    """The largest B and S by the formula, each held against a trace there and at one more."""
    found = [line.largest(at, axis, usable, limit if axis else None) for axis, line in enumerate(lines)]
    steps = (1, multiple)
    found = [n and n // by * by for n, by in zip(found, steps, strict=False)]
    verified = []
    for axis, n in enumerate(found):
        if n is None:
            continue
        for size in (n, n + steps[axis]):
            if size < 1 or (axis and limit is not None and size > limit):
                continue
            point = (*at[:axis], size, *at[axis + 1 :])
            traced = traces.ledger(point[0], point[1] if len(point) > 1 else None).memory.peak_bytes
            sizes = ", ".join(f"{letter} = {v}" for letter, v in zip(lines[axis].letters, point, strict=True))
            derived = lines[axis].peak_bytes(point)
            agrees = "as by the formula" if traced == derived else f"but by the formula {format_bytes(derived)}"
            fits = "fits" if traced <= usable else "does not fit"
            verified.append(f"traced at {sizes}: peak {format_bytes(traced)}, {agrees}: {fits}")
    return Fits(hardware, usable, found[0], found[1] if len(at) > 1 else None, limit, tuple(verified))


# ---- a callable's own widths


def _in_widths(
    traces: _Traces,
    letters: tuple[str, ...],
    points: Sequence[Powers],
    checks: Sequence[Powers],
    flops: Mapping[str, Polynomial],
    symbols: Sequence[str] | None,
) -> tuple[dict[str, Law], list[str]]:
    """FLOPs and parameters in a callable's integer arguments too. Raises BadInput where asked for and impossible."""
    defaults = {
        name: a.default
        for name, a in _arguments(traces.model).items()
        if name not in ("batch_size", "seq_len") and isinstance(a.default, int) and not isinstance(a.default, bool)
        and a.default > 0
    }  # fmt: skip
    if symbols is not None:
        unknown = [s for s in symbols if s not in defaults]
        if unknown:
            known = ", ".join(defaults) or "none"
            raise BadInput(f"{unknown[0]!r} is no integer argument with a default; the callable's are: {known}")
        defaults = {s: defaults[s] for s in symbols}
    if not defaults:
        return {}, []
    depth = {name: any(word in name.lower() for word in ("layer", "depth", "block")) for name in defaults}
    grid = [[1, 2] if depth[n] else [v, 2 * v, 3 * v] for n, v in defaults.items()]
    support = sorted({m.powers for f in ("forward", "backward") for m in flops[f].coefficients})
    if not support or any(m.to != 1 for f in flops.values() for m in f.coefficients):
        return {}, []
    needed = len(support) * int(np.prod([len(axis) for axis in grid]))
    if needed > MOST_TRACES:
        text = f"{needed} traces would be needed for formulas in {', '.join(defaults)} too; name fewer with --symbols"
        if symbols is not None:
            raise BadInput(text)
        return {}, [text]
    chosen = next(
        some
        for some in itertools.combinations(points, len(support))
        if Interpolation(letters, some, support).determined
    )
    names = tuple(defaults)
    try:
        return _fit_widths(traces, letters, names, chosen, support, grid, depth, checks), []
    except (BursarError, RuntimeError, ValueError, AssertionError, TypeError) as error:
        if symbols is not None:
            raise
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        return {}, [f"no formulas in {', '.join(names)}: {why}"]


def _fit_widths(
    traces: _Traces,
    letters: tuple[str, ...],
    names: tuple[str, ...],
    chosen: Sequence[Powers],
    support: Sequence[Powers],
    grid: Sequence[Sequence[int]],
    depth: Mapping[str, bool],
    checks: Sequence[Powers],
) -> dict[str, Law]:
    powers = basis([len(axis) - 1 for axis in grid])
    unseen = tuple(axis[-1] + axis[0] for axis in grid)

    def at(point: Powers, widths: Powers) -> _Seen:
        return traces.at(*point, widths=tuple(zip(names, widths, strict=True)))

    widths = list(itertools.product(*grid))
    every = (*names, *letters)  # S stays the last letter: it alone is ever rounded
    made = Interpolation(every, [(*w, *p) for w in widths for p in chosen], [(*w, *p) for w in powers for p in support])
    values = [at(p, w) for w in widths for p in chosen]
    check = ((*unseen, *checks[-1]), at(checks[-1], unseen))
    found = {}
    for figure in ("forward", "backward", "model"):
        p = made.fit([v.flops[figure] for v in values], [(check[0], check[1].flops[figure])])
        if p is None:
            raise BadInput(f"{figure} FLOPs are no polynomial in {', '.join(names)} that holds at {check[0]}")
        found[figure] = Law(p, read_widths(p))
    only = Interpolation(names, widths, powers)
    n = only.fit([at(chosen[0], w).parameters for w in widths], [(unseen, check[1].parameters)])
    if n is None:
        raise BadInput(f"the number of parameters is no polynomial in {', '.join(names)} that holds at {unseen}")
    return {**found, "parameters": Law(n, read_widths(n))}


# ---- the model's matrices


def _weights(model: Any, given: Any, shape: Transformer | None) -> tuple[int | None, str]:
    """Parameters in the matrices that one token is multiplied by, and which those are."""
    if shape is not None:
        return decoder_matrices(shape), "parameters in matrices: no table that is only looked up, bias or norm"
    if isinstance(model, str) and model.split(":")[0] in architecture.known_models():
        network = architecture.preset(model)
        if isinstance(network, Network) and network.kind in mixture.KINDS:
            active = mixture.products(network, 1, 1).active_parameters
            return active, "parameters in the matrices one token meets: k of E experts, no table that is only looked up"
    return _matrices(given), "parameters in matrices: no table that is only looked up, bias or norm"


def _matrices(given: Any) -> int | None:
    """Parameters in matrices that multiply, no tables that are only looked up; None where weights have more dims."""
    work = resolve(given) if isinstance(given, str) else from_callable(given, "")
    with torch.device("meta"):
        module, _ = work.make()
    looked_up = {id(m.weight) for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    multiplies = {
        id(p) for m in module.modules() if not isinstance(m, (nn.Embedding, nn.EmbeddingBag))
        for p in m.parameters(recurse=False)
    }  # fmt: skip
    weights = [p for p in module.parameters() if p.dim() >= 2 and (id(p) not in looked_up or id(p) in multiplies)]
    return sum(p.numel() for p in weights) if all(p.dim() == 2 for p in weights) else None
