"""What changed between two steps: two records of ``bursar step --json``, laid side by side. No torch.

Figures are compared by their place in the record, modules by their path. Nothing is rounded before it is compared, so a
gate on "no more than 2 %" is exact.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

from bursar.errors import BadInput
from bursar.memory import CLASSES
from bursar.modules import Share, numbered, unfolded
from bursar.rules import KINDS

Number = int | float
_MOST_COPIES = 10**5  # of one module: a record is a file, and may say anything

# place in the record -> (what a page calls it, its unit)
FIGURES: Mapping[str, tuple[str, str]] = {
    "model.parameters": ("parameters", ""),
    "model.trainable_parameters": ("trainable", ""),
    "step.samples": ("samples", ""),
    "step.tokens": ("tokens", ""),
    "step.micro_batches": ("micro-batches", ""),
    "flops.forward": ("forward", "FLOP"),
    "flops.backward": ("backward", "FLOP"),
    "flops.model": ("model FLOPs", "FLOP"),
    "flops.recompute": ("recompute", "FLOP"),
    "flops.hardware": ("hardware FLOPs", "FLOP"),
    "flops.optimizer": ("optimizer", "FLOP"),
    **{f"flops.by_kind.{k}": (f"kind {k}", "FLOP") for k in KINDS},
    "flops.total": ("all FLOPs", "FLOP"),
    **{f"bytes_moved.by_kind.{k}": (f"moved by {k}", "B") for k in KINDS},
    "bytes_moved.total": ("bytes moved", "B"),
    **{f"memory.at_peak.{c}": (f"{c.replace('_', ' ')} at peak", "B") for c in CLASSES},
    "memory.peak_bytes": ("peak", "B"),
    "memory.reserved_bytes": ("reserved", "B"),
    "time.roofline_seconds": ("time bound", "s"),
}
ALWAYS = ("model.parameters", "flops.model", "flops.total", "bytes_moved.total", "memory.peak_bytes",
          "time.roofline_seconds")  # fmt: skip
OF_A_MODULE = {"flops": ("FLOPs", "FLOP"), "bytes_moved": ("bytes moved", "B"),
               "bytes_at_peak": ("at peak", "B"), "roofline_seconds": ("time bound", "s")}  # fmt: skip


class Lines(NamedTuple):
    """Lines that differ: ``removed`` from ``first`` on before, ``added`` from ``first_after`` on in their place."""

    first: int
    removed: int
    first_after: int
    added: int


@dataclass(frozen=True, slots=True)
class FileChange:
    """A file of the traced model's code that differs between the two sides."""

    path: str
    lines: tuple[Lines, ...]

    @property
    def added(self) -> int:
        """Lines that are new."""
        return sum(x.added for x in self.lines)

    @property
    def removed(self) -> int:
        """Lines that are gone."""
        return sum(x.removed for x in self.lines)


class Source(NamedTuple):
    """Where a module's class stands."""

    file: str
    first: int
    last: int


@dataclass(frozen=True)
class Side:
    """One of the two: how it was asked for, its record, and the classes of its modules by path, where known."""

    name: str
    record: Mapping[str, Any]
    revision: str = ""  # "main (3f2a…)", "working tree", or none
    sources: Mapping[str, Sequence[Source]] | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """One figure on both sides; None where a side does not have it."""

    figure: str
    before: Number | None
    after: Number | None

    @property
    def change(self) -> Number | None:
        """After less before."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def relative(self) -> float | None:
        """The change as a share of what was before; None where that is nothing."""
        return None if self.change is None or not self.before else float(Fraction(self.change) / Fraction(self.before))


@dataclass(frozen=True, slots=True)
class ModuleChange:
    """A module that is not as it was, or ``copies`` alike whose first number rises by one; figures are each one's."""

    status: str  # changed, added, removed or renamed
    module: str
    copies: int
    was: str  # its path before; another one where it was renamed
    changes: tuple[Change, ...]
    lines: tuple[str, ...] = ()  # of its class, or of the nearest around it: "model.py:41-44"


@dataclass(frozen=True)
class Diff:
    """What changed between ``a`` and ``b``."""

    a: Side
    b: Side
    figures: tuple[Change, ...]  # all of them, in the order of FIGURES
    modules: tuple[ModuleChange, ...]
    files: tuple[FileChange, ...]
    notes: tuple[str, ...]
    uncounted: tuple[str, ...]  # ops that b leaves uncounted more often than a

    @property
    def same(self) -> bool:
        """Whether no figure and no module differs."""
        return not self.modules and not self.uncounted and all(c.before == c.after for c in self.figures)


def compare(a: Side, b: Side, files: Sequence[FileChange] = (), notes: Sequence[str] = ()) -> Diff:
    """``b`` laid beside ``a``. Raises BadInput for a record that is not one of ``bursar step --json``."""
    said = list(notes)
    figures = tuple(Change(path, _figure(a, path), _figure(b, path)) for path in FIGURES)
    devices = [side.record.get("hardware") for side in (a, b)]
    if devices[0] != devices[1]:
        figures = tuple(replace(c, before=None, after=None) if c.figure.startswith("time") else c for c in figures)
        said.append(f"time bounds are not compared: A is priced on {_device(devices[0])}, B on {_device(devices[1])}")
    elif devices[0] is None:
        said.append("time bounds are not compared: neither side is priced on a device")
    versions = [dict(side.record.get("versions") or {}) for side in (a, b)]
    said += [
        f"A was counted with {name} {versions[0][name]}, B with {versions[1][name]}"
        for name in sorted(versions[0].keys() & versions[1].keys())
        if versions[0][name] != versions[1][name]
    ]
    modules: tuple[ModuleChange, ...] = ()
    if all("modules" in side.record for side in (a, b)):
        modules = _modules(a, b, files, timed=devices[0] == devices[1] and devices[0] is not None)
    else:
        said.append("modules are not compared: a saved record has none; write it again with bursar step --json")
    return Diff(a, b, figures, modules, tuple(files), tuple(said), _uncounted(a, b))


def _figure(side: Side, path: str) -> Number | None:
    found: Any = side.record
    names = path.split(".")
    for name in names:
        if found is None or (isinstance(found, Mapping) and name not in found and "by_kind" in names):
            return None if found is None else 0
        if not isinstance(found, Mapping) or name not in found:
            raise BadInput(f"{side.name} is no record of bursar step --json: it has no {path}")
        found = found[name]
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        raise BadInput(f"{side.name} is no record of bursar step --json: its {path} is {found!r}, not a number")
    return found


def _device(hardware: Mapping[str, Any] | None) -> str:
    return "no device" if not hardware else f"{hardware.get('count')} × {hardware.get('name')}"


def _uncounted(a: Side, b: Side) -> tuple[str, ...]:
    before, after = ({u["op"]: u["calls"] for u in side.record["flops"].get("uncounted") or ()} for side in (a, b))
    return tuple(op for op in sorted(after) if after[op] > before.get(op, 0))


# ---- modules


class _Pair(NamedTuple):
    status: str
    was: str
    module: str
    before: tuple[Number | None, ...]
    after: tuple[Number | None, ...]
    lines: tuple[str, ...]


def _modules(a: Side, b: Side, files: Sequence[FileChange], timed: bool) -> tuple[ModuleChange, ...]:
    shares = [{s.module: s[2:6] if timed else s[2:5] for s in _shares(side)} for side in (a, b)]
    width = 4 if timed else 3
    none = (0,) * width
    there = [_paths(side, found) for side, found in zip((a, b), shares, strict=True)]
    removed, added = (_outermost(shares[i], there[1 - i]) for i in (0, 1))
    renamed = _renamed(removed, added)
    pairs = [
        _Pair("changed", path, path, shares[0].get(path, none), shares[1].get(path, none), ())
        for path in {**shares[1], **shares[0]}
        if (path in there[1] or path not in shares[0]) and (path in there[0] or path not in shares[1])
    ]
    pairs = [p for p in pairs if p.before != p.after]
    for top, parts in removed.items():
        if top in renamed:
            figures = _sum(parts, none)
            pairs.append(_Pair("renamed", top, renamed[top], figures, figures, ()))
        else:
            pairs.append(_Pair("removed", top, top, _sum(parts, none), none, ()))
    taken = set(renamed.values())
    pairs += [_Pair("added", top, top, none, _sum(parts, none), ()) for top, parts in added.items() if top not in taken]
    pairs = [p._replace(lines=_lines(a, b, p, files)) for p in pairs]
    found = [_change(run) for run in _alike(pairs)]
    return tuple(sorted(found, key=_largest_first))


def _shares(side: Side) -> Iterator[Share]:
    found: list[Share] = []
    for m in side.record["modules"]:
        fields: Any = [m.get(name) for name in Share._fields] if isinstance(m, Mapping) else None
        share = fields and Share(*fields)
        if (
            share is None
            or not isinstance(share.module, str)
            or not all(isinstance(n, int) and not isinstance(n, bool) for n in share[1:5])
            or not 1 <= share.copies <= _MOST_COPIES
        ):
            raise BadInput(f"{side.name} is no record of bursar step --json: a module of it reads {m!r}")
        found.append(share)
    return unfolded(found)


def _paths(side: Side, shares: Mapping[str, Any]) -> set[str]:
    """Every module of the side: those that cost something, those around them, and the rest where they are known."""
    found = {""}
    for path in (*shares, *(side.sources or ())):
        names = path.split(".")
        found.update(".".join(names[: i + 1]) for i in range(len(names)))
    return found


def _outermost(
    shares: Mapping[str, tuple[Number | None, ...]], others: set[str]
) -> dict[str, dict[str, tuple[Number | None, ...]]]:
    """The outermost modules that the other side does not have -> what is in them, by path from there."""
    found: dict[str, dict[str, tuple[Number | None, ...]]] = {}
    for path, figures in shares.items():
        if path in others:
            continue
        names = path.split(".")
        depth = next(i for i in range(1, len(names) + 1) if ".".join(names[:i]) not in others)
        found.setdefault(".".join(names[:depth]), {})[".".join(names[depth:])] = figures
    return found


def _renamed(removed: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, str]:
    """Which removed module is which added one: the same place, the same parts with the same figures."""
    found: dict[str, str] = {}
    for old, parts in removed.items():
        place = old.rpartition(".")[0]
        same = [new for new in added if added[new] == parts and new not in found.values()]
        here = [new for new in same if new.rpartition(".")[0] == place]
        if here or same:
            found[old] = (here or same)[0]
    return found


def _sum(parts: Mapping[str, tuple[Number | None, ...]], none: tuple[int, ...]) -> tuple[Number | None, ...]:
    columns = list(zip(*parts.values(), strict=True))
    return tuple(_total(column) for column in columns) or none


def _total(column: Sequence[Number | None]) -> Number:
    known = [n for n in column if n is not None]
    return sum(known) if all(isinstance(n, int) for n in known) else math.fsum(known)


def _alike(pairs: Sequence[_Pair]) -> Iterator[list[_Pair]]:
    """Pairs that differ in their first number alone, which rises by one."""
    runs: dict[tuple[Any, ...], list[_Pair]] = {}
    made: list[list[_Pair]] = []
    for pair in sorted(pairs, key=lambda p: _natural(p.module)):
        parts, was = numbered(pair.module), numbered(pair.was)
        if parts is None or was is None or parts[1] != was[1]:
            made.append([pair])
            continue
        key = (pair.status, parts[0], parts[2], was[0], was[2])
        run = runs.get(key)
        if run is not None:
            last = numbered(run[-1].module)
            if last is not None and last[1] + 1 == parts[1] and run[-1][3:] == pair[3:]:
                run.append(pair)
                continue
        runs[key] = [pair]
        made.append(runs[key])
    return iter(made)


def _natural(path: str) -> tuple[tuple[int, int, str], ...]:
    return tuple((0, int(n), "") if n.isdecimal() else (1, 0, n) for n in path.split("."))


def _change(run: Sequence[_Pair]) -> ModuleChange:
    first = run[0]
    changes = tuple(
        Change(figure, before, after)
        for figure, before, after in zip(OF_A_MODULE, first.before, first.after, strict=False)
        if before != after
    )
    return ModuleChange(first.status, first.module, len(run), first.was, changes, first.lines)


def _largest_first(change: ModuleChange) -> tuple[Any, ...]:
    sizes = {c.figure: abs(c.change or 0) * change.copies for c in change.changes}
    return (*(-sizes.get(figure, 0) for figure in OF_A_MODULE), _natural(change.module))


# ---- lines


def changed_lines(before: str, after: str) -> tuple[Lines, ...]:
    """Which lines differ between two texts; lines are numbered from 1.

    >>> changed_lines("a\\nb\\nc\\n", "a\\nB\\nc\\nd\\n")
    (Lines(first=2, removed=1, first_after=2, added=1), Lines(first=4, removed=0, first_after=4, added=1))
    """
    matcher = difflib.SequenceMatcher(None, before.splitlines(), after.splitlines(), autojunk=False)
    return tuple(
        Lines(i + 1, i_end - i, j + 1, j_end - j) for tag, i, i_end, j, j_end in matcher.get_opcodes() if tag != "equal"
    )


def span(file: str, lines: Lines) -> str:
    """Where lines changed, as an editor understands it: of the file after, or before where they are gone.

    >>> span("model.py", Lines(41, 2, 41, 4)), span("model.py", Lines(7, 1, 7, 0))
    ('model.py:41-44', 'model.py:7 (1 line less)')
    """
    if not lines.added:
        return f"{file}:{lines.first_after} ({lines.removed} line{'s' if lines.removed > 1 else ''} less)"
    last = lines.first_after + lines.added - 1
    return f"{file}:{lines.first_after}" + (f"-{last}" if last > lines.first_after else "")


def _lines(a: Side, b: Side, pair: _Pair, files: Sequence[FileChange]) -> tuple[str, ...]:
    """The changed lines of the module's class, else of the nearest module around it whose class has some."""
    changed = {f.path: f.lines for f in files}
    was, now = pair.was.split("."), pair.module.split(".")
    for depth in range(max(len(was), len(now)), -1, -1):
        before, after = ".".join(was[:depth]), ".".join(now[:depth])
        hit = {
            (s.file, lines)
            for side, path in ((a, before), (b, after))
            for s in (side.sources or {}).get(path, ())
            for lines in changed.get(s.file, ())
            if _touches(s, lines, of_a=side is a)
        }
        if hit:
            return tuple(span(file, lines) for file, lines in sorted(hit))
    return ()


def _touches(source: Source, lines: Lines, of_a: bool) -> bool:
    first, count = (lines.first, lines.removed) if of_a else (lines.first_after, lines.added)
    return count > 0 and first <= source.last and source.first <= first + count - 1
